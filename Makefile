# `make demo` and `make test` work on a fresh machine: they create .venv and install into it what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-gpu test-network quality format cards tables

demo: $(VENV)/.installed
	$(BIN)/python recipes/digits.py --output-dir runs/digits

# Two processes of one thread: most tests are too small to keep two threads busy, or wait for another process.
test: export OMP_NUM_THREADS := 1
test: export CUDA_VISIBLE_DEVICES :=
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_OPTIONS)

test-slow test-gpu test-network: test-%: $(VENV)/.installed
	$(BIN)/python -m pytest -m $*

test-network: export HF_HUB_OFFLINE := 0
test-gpu: export CUDA_VISIBLE_DEVICES ?= 0

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=recipes $(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python .ci/limits.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The cards of the released students, out of the results files of their recipes.
cards: $(VENV)/.installed
	PYTHONPATH=recipes $(BIN)/python -m harness.cards

# The page of all recipes, and the tables and the figure of README and docs, out of the results files.
tables: $(VENV)/.installed
	PYTHONPATH=recipes $(BIN)/python -m harness.page
	PYTHONPATH=recipes $(BIN)/python -m harness.summary

# Reinstalled only when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "$(PYTHON) is older than Python 3.10: set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
