# shoal: `make serve` and `make test` need only Python 3.11-3.13, make and a package index.
#
#   make serve            serve SmolLM2-135M-Instruct with the shipped adapters on this machine
#   make serve ARGS="--port 8123 --device cpu"
#   make test             the test suite, including the tests on the real model (WORKERS= for one process)
#   make check            lint + types + tests: exactly what CI runs
#   make bench            the CPU throughput comparison of the README
#
# TORCH picks the build: the default is the plain 2.13.0 of your package index. For a CPU-only
# build from pytorch.org:  make serve TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=
# A worker a core; one file's tests stay together, because they share what is slow to make.
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

BIN    := $(VENV)/bin
BASE   := $(VENV)/.base-installed
DEV    := $(VENV)/.dev-installed
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: serve test check lint types bench gpu format clean

serve: $(BASE)
	@exec $(BIN)/shoal serve $(ARGS)

test: $(DEV)
	@$(BIN)/shoal pull smollm2
	$(BIN)/pytest $(WORKERS) $(ARGS)

check: lint types test

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

bench: $(DEV)
	@$(BIN)/shoal pull smollm2
	$(BIN)/python -m shoal.loadtests.compare $(ARGS)

gpu: $(DEV)
	SHOAL_TEST_GPU=1 $(BIN)/pytest tests/gpu tests/kernels tests/server/test_device_runner.py $(ARGS)

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

# Rebuilt only when the requirements change, so that second runs start at once.
$(BASE): pyproject.toml constraints.txt
	@echo "shoal: building $(VENV) (once; torch and transformers are the large parts) ..."
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "shoal needs Python 3.11, 3.12 or 3.13; this is %d.%d. hint: make PYTHON=python3.12" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "shoal: installing $(TORCH) ..."
	@$(PIP) $(TORCH)
	@echo "shoal: installing shoal and what it needs ..."
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(DEV): $(BASE)
	@echo "shoal: installing the test tools ..."
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
