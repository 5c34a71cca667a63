# demo and test install what is missing, see bin/setup-venv.
PYTHON := .venv/bin/python
SHELL_FILES := bin/setup-venv .ci/run

.PHONY: help venv demo test check clean

help:
	@echo 'make demo    train on a real Slurm of four nodes on this machine, and take the power from one'
	@echo 'make test    run all tests; those that need a real Slurm only as root'
	@echo 'make check   ruff, mypy, shellcheck'
	@echo 'make clean   remove .venv and what the commands above left'

venv:
	@bin/setup-venv

demo: venv
	@$(PYTHON) bin/demo

test: venv
	$(PYTHON) -m pytest $(PYTEST_ARGS)

check:
	@bin/setup-venv dev,examples,test
	$(PYTHON) -m ruff check . bin/demo
	$(PYTHON) -m mypy
	shellcheck $(SHELL_FILES)

clean:
	rm -rf .venv build dist elastic-logs digits .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
