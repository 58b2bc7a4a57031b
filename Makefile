# Two commands set up a fresh machine: `make demo` and `make test`. Both need only Python >= 3.11.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types test-slow test-gpu fuzz clean

demo: $(VENV)/.demo
	$(BIN)/moebius demo

test: $(VENV)/.test lint types
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreted || [ $$? -eq 5 ]  # 5: no Triton here, nothing to run

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# Another seed, more of them, more processes: make fuzz SEED=2 CASES=1000000 JOBS=8
SEED ?= 1
CASES ?= 100000
JOBS ?= 1
fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz --count $(CASES) --seed $(SEED) --jobs $(JOBS)

# torch goes in first, by itself, so that the choice of its build (TORCH=...) holds for everything after it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || \
	  { echo "error: $(PYTHON) is not a Python >= 3.11 with ensurepip; say PYTHON=python3.12 (Debian: apt-get install python3-venv)"; exit 2; }
	@echo "first time: PyTorch and Moebius go into $(VENV); some minutes, a gigabyte or more"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[plots]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[plots,test,kernels]"
	@touch $@

# Runs in the Python that has the card's torch: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu -W default tests/gpu

clean:
	rm -rf $(VENV) moebius-demo
