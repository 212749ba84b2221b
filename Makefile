# Every target that needs packages depends on the stamp of `make setup`, so it installs once.
PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow parity lint types bench docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install Meristem with everything it can use (about 2 minutes, 6 GB)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; try make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 2 minutes the first time)"
	@$(BIN)/python -m pip install -q -e ".[all,dev]" -c constraints.txt
	@touch $@

demo: $(STAMP)  ## train on a sample of real proteins, embed it, find neighbours, draw a map
	$(BIN)/python examples/demo_protein.py

test: $(STAMP)  ## run the tests that this machine can run, but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

slow: $(STAMP)  ## run the slow tests: processes that are killed, compiled steps, several processes, packages of others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow

parity: $(STAMP)  ## compare every family with the library it comes from, and write docs/parity.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --write-parity tests/interop tests/vision tests/dna tests/generation tests/model/test_original_transformer.py

lint: $(STAMP)  ## check style, format and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## check the types of the core and the built-in domains
	$(BIN)/mypy

bench: $(STAMP)  ## time against peers (an hour), write benchmarks/results and the tables of docs/speed.md
	$(BIN)/python benchmarks/run.py all
	$(BIN)/python benchmarks/report.py

docs: $(STAMP)  ## check that links, commands and paths in the documentation hold
	$(BIN)/python -m pytest tests/test_house.py

clean:  ## delete caches, builds, demo results and .venv (never runs)
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find core domains tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
