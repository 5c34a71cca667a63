# demo and test install missing packages, see bin/setup-venv.
PYTHON := .venv/bin/python
SHELL_FILES := bin/setup-venv bin/trixie $(wildcard .ci/run)
MADE := site build dist elastic-logs digits .pytest_cache .mypy_cache .ruff_cache .hypothesis
# Under sudo, files made in the caller's checkout belong to the caller.
GIVE_BACK = if [ "$$(id -u)" = 0 ] && [ -n "$$SUDO_UID" ] && [ "$$(stat -c %u .)" = "$$SUDO_UID" ]; then \
	find . -xdev -path ./.git -prune -o -user root -exec chown -h "$$SUDO_UID:$$SUDO_GID" {} +; fi

.PHONY: help demo test test-site test-trixie check docs clean

help:
	@echo 'make demo    train on a real Slurm of four nodes on this machine, and cut the power of one node'
	@echo 'make test    run all tests; those that need a real Slurm only as root'
	@echo 'make test-site  the tests that need a real Slurm, on one that is configured as sites do it'
	@echo 'make test-trixie  the same tests on the Slurm of Debian 13, see bin/trixie'
	@echo 'make check   ruff, mypy, shellcheck, and the words of documents, messages and comments'
	@echo 'make docs    the reference, the man pages and the completion from the code, and the site into site/'
	@echo 'make clean   remove .venv, .venv-2.14 and what the commands above left'

# ELASTIC_HPC_TORCH_214: another interpreter with torch 2.14 for the demo and the in-place tests, or "off"
demo:
	@python=$${ELASTIC_HPC_TORCH_214:-.venv-2.14/bin/python}; \
	if [ "$$python" = off ] || { [ -z "$$ELASTIC_HPC_TORCH_214" ] && ! bin/setup-venv examples 2.14.1; }; then \
		bin/setup-venv examples && python=$(PYTHON); \
	fi && { "$$python" bin/demo $(if $(RESTART),--restart); code=$$?; $(GIVE_BACK); exit $$code; }

test:
	@bin/setup-venv
	@[ -n "$$ELASTIC_HPC_TORCH_214" ] || bin/setup-venv live 2.14.1 || echo 'make: the in-place tests are skipped'
	@XDG_STATE_HOME="$(CURDIR)/.pytest_cache/state" $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS); \
	code=$$?; $(GIVE_BACK); exit $$code

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
	$(PYTHON) -m pytest -q -n 0 tests/unit/test_words.py
	@$(GIVE_BACK)

docs:
	@bin/setup-venv docs
	@$(PYTHON) bin/docs build

clean:
	@rm -rf .venv .venv-* $(MADE) *.egg-info 2>/dev/null; find . -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null; \
	left=$$(find . -maxdepth 1 \( -name '.venv*' $(MADE:%=-o -name %) \) -printf '%f (of %u) '); \
	[ -z "$$left" ] || { echo "make: not removed: $${left% }; type: sudo make clean" >&2; exit 1; }
