# Two commands matter: `make search` tunes kernels for this machine, `make test` runs the tests. Both set everything up.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: search test bench lint types wheel clean setup

search: $(READY)
	$(BIN)/mctune search --gpu cpu --workload quick

test: $(READY)
	$(BIN)/pytest

bench: $(READY)
	$(BIN)/mctune bench --out results/cpu/bench.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)
	$(BIN)/pip wheel -q --no-deps -w dist .

setup: $(READY)

# torch first and by its exact version: any other spelling may resolve to a build for another device.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
