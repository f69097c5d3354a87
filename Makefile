# make search: find a policy with the defaults.    make test: the whole check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: search test

search: $(VENV)/.installed
	$(BIN)/autoprune search --budget latency=50%

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports

# Installed as a link to this checkout, so only a change of pyproject.toml calls for another installation.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "autoprune needs Python 3.11 to 3.13; run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
