# `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test fuzz bench clean

demo: .venv/ready
	$(BIN)/gradclip demo --out demo-out $(ARGS)

test: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -n 2 $(ARGS)

fuzz: .venv/ready
	GRADCLIP_FUZZ_EXAMPLES=7000 $(PYTEST) -n 2 tests/test_fuzz.py $(ARGS)

bench: .venv/ready
	$(BIN)/python -m benchmarks $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,jax]" --group dev
	touch $@

clean:
	rm -rf .venv demo-out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
