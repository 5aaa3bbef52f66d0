# Each target sets up what it needs: the virtual environment, then the package in it. Both are done
# once; the package is installed again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# Test processes. More than the cores do not help: each one compiles.
TEST_PROCESSES ?= 2
# Malformed files of each kind that `make fuzz` tries; the tests try 300.
FUZZ_EXAMPLES ?= 10000
# Faults that `make chaos` injects into training runs; the tests inject 20.
CHAOS_FAULTS ?= 200
# For example: make test PYTEST_ARGS='-m "not slow" -k expand'
PYTEST_ARGS ?=
# For example: make quickstart QUICKSTART_ARGS='--seed 1'
QUICKSTART_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installs into one environment at once would break it.
.NOTPARALLEL:
.PHONY: help quickstart test test-fast test-compiled fuzz chaos lint install clean

help:
	@echo "make quickstart   set up, then the whole path on a small model (a few minutes, no network)"
	@echo "make test         set up, then lint and every test"
	@echo "make test-fast    the same without the slow tests"
	@echo "make test-compiled  set up, then compile steps for TPUs and GPUs that are not here (4 GB)"
	@echo "make fuzz         set up, then $(FUZZ_EXAMPLES) malformed files of each kind (20 minutes)"
	@echo "make chaos        set up, then $(CHAOS_FAULTS) faults injected into training runs (an hour, Linux)"
	@echo "make lint         set up, then ruff"
	@echo "make install      set up only; then $(BIN)/llamapro --help"
	@echo "make clean        remove the environment and the caches (not runs/)"
	@echo
	@echo "PYTHON=$(PYTHON) makes the environment VENV=$(VENV); for a second Python name a second VENV."

quickstart: $(VENV)/.stamp-base
	@$(BIN)/llamapro quickstart --out runs/quickstart $(QUICKSTART_ARGS)

test: lint
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --ignore tests/compiled $(PYTEST_ARGS)

test-fast: lint
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --ignore tests/compiled \
	  -m "not slow" $(PYTEST_ARGS)

# In one process: the compiler takes all cores, and gigabytes of memory.
test-compiled: $(VENV)/.stamp-compilers
	@$(BIN)/python -m pytest tests/compiled $(PYTEST_ARGS)

fuzz: $(VENV)/.stamp-test
	@LLAMAPRO_FUZZ=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -n $(TEST_PROCESSES) tests/test_fuzz.py \
	  $(PYTEST_ARGS)

chaos: $(VENV)/.stamp-base
	@$(BIN)/python benchmarks/chaos.py --faults $(CHAOS_FAULTS)

lint: $(VENV)/.stamp-test
	@$(BIN)/ruff check .

install: $(VENV)/.stamp-base

clean:
	rm -rf "$(VENV)" .pytest_cache .ruff_cache .hypothesis build dist
	find llamapro_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is the last thing a rule writes, so an interrupted rule starts again.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is missing or older than Python 3.11:" \
	    "make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv "$(VENV)"
	@touch $@

$(VENV)/.stamp-base: pyproject.toml | $(VENV)/.stamp-venv
	@echo "Installing llamapro_jax into $(VENV) (some minutes the first time)"
	@$(PIP) install -qq --editable .
	@touch $@

$(VENV)/.stamp-test: pyproject.toml | $(VENV)/.stamp-venv
	@echo "Installing llamapro_jax[test] into $(VENV) (some minutes the first time)"
	@$(PIP) install -qq --editable ".[test]"
	@touch $(VENV)/.stamp-base $@

# Where there are no wheels of CUDA the tests for GPUs are skipped, and pytest says so.
$(VENV)/.stamp-compilers: $(VENV)/.stamp-test
	@echo "Installing llamapro_jax[test,tpu,cuda12] into $(VENV) (libtpu 0.7 GB, CUDA 3 GB)"
	@$(PIP) install -qq --editable ".[test,tpu,cuda12]" || \
	  { echo "no CUDA: only the compiler for TPUs"; $(PIP) install -qq --editable ".[test,tpu]"; }
	@touch $@
