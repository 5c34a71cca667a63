# demo and test install what is missing, see bin/setup-venv.
PYTHON := .venv/bin/python
SHELL_FILES := bin/setup-venv bin/trixie .ci/run

.PHONY: help demo test test-site test-trixie check docs clean

help:
	@echo 'make demo    train on a real Slurm of four nodes on this machine, and take the power from one'
	@echo 'make test    run all tests; those that need a real Slurm only as root'
	@echo 'make test-site  the tests that need a real Slurm, on one that is configured as sites do it'
	@echo 'make test-trixie  the same tests on the Slurm of Debian 13, see bin/trixie'
	@echo 'make check   ruff, mypy, shellcheck'
	@echo 'make docs    the reference, the man pages and the completion from the code, and the site into site/'
	@echo 'make clean   remove .venv and what the commands above left'

demo:
	@bin/setup-venv examples
	@$(PYTHON) bin/demo

test:
	@bin/setup-venv
	XDG_STATE_HOME="$(CURDIR)/.pytest_cache/state" $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-site:
	MINI_SLURM_SITE=1 $(MAKE) test PYTEST_ARGS='tests/slurm $(PYTEST_ARGS)'

test-trixie:
	@bin/setup-venv
	bin/trixie $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/slurm $(PYTEST_ARGS)

check:
	@bin/setup-venv dev,examples,test
	$(PYTHON) -m ruff check . bin/demo bin/docs
	$(PYTHON) -m mypy
	shellcheck $(SHELL_FILES)

docs:
	@bin/setup-venv docs
	@$(PYTHON) bin/docs build

clean:
	rm -rf .venv site build dist elastic-logs digits .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
