# Override on the command line, e.g. `make test PYTHON=python3.12`.
PYTHON ?= python3
# What to install as torch, and the versions that go with it.
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
# More arguments for pip, e.g. an --extra-index-url with CPU builds of torch.
PIP_ARGS ?=
# Test files that run at a time; 0 runs all tests in one process.
WORKERS ?= 2

BIN := .venv/bin
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart test lint clean
.DELETE_ON_ERROR:

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

quickstart: .venv/.installed ## train, evaluate, export and question the tiny model
	$(BIN)/foveate quickstart

test: .venv/.dev ## run the tests
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: .venv/.dev ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environment, builds and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The console scripts are used throughout: `python -m` would put the root on sys.path (CONTRIBUTING.md says why not).
.venv/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Foveate needs Python 3.11 or newer, e.g. make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) "$(TORCH)"
	$(BIN)/pip install $(PIP_ARGS) -c $(CONSTRAINTS) -e .
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[dev]"
	$(BIN)/pip install $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps lmms-eval # pyproject.toml says why without what it asks for
	mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/foveate
	touch $@
