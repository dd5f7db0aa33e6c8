# Everything a contributor runs. Needs only python3 (3.11 or newer), make and git; tools live in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := autopar passes cost_model

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "autopar needs Python 3.11 or newer; say which: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "install: autopar and its test tools into $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP)  ## train a small GPT on two local ranks, compare it with its estimate and with one device
	@echo "demo: examples/train_gpt.py"
	@$(BIN)/python examples/train_gpt.py

test: $(STAMP)  ## run the tests that are not marked slow, two at a time
	@echo "test: all tests but the slow ones, two at a time"
	@$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: $(STAMP)  ## run every test
	@echo "test-all: all tests"
	@$(BIN)/python -m pytest

check: $(STAMP)  ## lint, formatting, types, import contracts
	@echo "check: ruff (lint, format), mypy --strict, import contracts"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict $(foreach package,$(PACKAGES),-p $(package))
	@$(BIN)/lint-imports --no-logo

clean:  ## remove .venv, caches and built packages
	@echo "clean: .venv, caches, dist"
	@rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
