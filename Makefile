# Every target makes .venv, or reuses it, and installs what it needs into it.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test check lint results bench evidence notebooks clean

demo: .venv/package
	$(BIN)/python -m topkast_func boston --overwrite

test: .venv/tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Before a commit: lint, types, and the tests that are quick.
check: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "not slow"

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# From the JSON alone: benchmarks/RESULTS.md, its figures, and the tables of the README.
results: .venv/package
	$(BIN)/python -m benchmarks.page

# An hour on two cores, which should have nothing else to do.
bench: .venv/bench
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.page

# Hours on two cores; what is done is not done again.
evidence: .venv/package
	for task in mlp cnn text source mlp_sgd cnn_sgd; do $(BIN)/python -m benchmarks.evidence $$task --ablations; done
	$(BIN)/python -m benchmarks.page

# In place, from top to bottom, with what they show.
notebooks: .venv/tests
	TQDM_DISABLE=1 PYTHONWARNINGS=ignore $(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv

.venv/package: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

# torch-scatter and torch-sparse build against the torch that is installed: about ten minutes
# on two cores, once.
.venv/torch-sparse: .venv/package
	$(PIP) setuptools wheel ninja
	$(PIP) --no-build-isolation torch-scatter torch-sparse
	touch $@

.venv/tests: .venv/torch-sparse
	$(PIP) --editable '.[test,lint]'
	touch $@

.venv/bench: .venv/torch-sparse
	$(PIP) --editable '.[bench]'
	touch $@
