# `make demo` and `make test` need nothing but Python 3.10 or newer with venv: each makes .venv and installs into it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test lint format docs stress benchmarks clean

demo: $(VENV)/.demo  ## serve a real model by deadline on this machine; ARGS="--trace FILE" replays a real log
	$(BIN)/sponge demo $(ARGS)

test: $(VENV)/.dev  ## the test suite; ARGS goes to pytest
	$(BIN)/python -m pytest -m "not stress" $(ARGS)

stress: $(VENV)/.dev  ## the long tests
	$(BIN)/python -m pytest -m stress $(ARGS)

lint: $(VENV)/.dev  ## what CI checks besides the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev  ## the documentation, in build/docs; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

benchmarks: $(VENV)/.dev  ## all benchmarks, one after the other; see benchmarks/README.md
	for name in solver decision overhead resize simulator; do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
