# `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-integrations fuzz bench studies clean

demo: .venv/ready
	$(BIN)/gradclip demo --out demo-out $(ARGS)

test: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -n 2 --ignore tests/test_sharded.py $(ARGS)
	$(PYTEST) tests/test_sharded.py

# The trainers are large, and have an environment of their own.
test-integrations: .venv-integrations/ready
	.venv-integrations/bin/python -m pytest -W default tests/integrations $(ARGS)

fuzz: .venv/ready
	GRADCLIP_FUZZ_EXAMPLES=7000 $(PYTEST) -n 2 tests/test_fuzz.py $(ARGS)

bench: .venv/ready
	$(BIN)/python -m benchmarks $(ARGS)

# About 15 CPU minutes; what is in docs/studies already is not computed again.
studies: .venv/ready
	for name in $$($(BIN)/gradclip study | cut -d' ' -f1); do \
		$(BIN)/gradclip study $$name --out docs/studies $(ARGS) || exit 1; done
	$(BIN)/gradclip study --page docs/studies.md --out docs/studies

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,jax]" --group dev
	touch $@

.venv-integrations/ready: pyproject.toml constraints-integrations.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-integrations/bin/python -m pip install --quiet \
		-c constraints-integrations.txt \
		-e ".[lightning,transformers,accelerate,keras,jax]" --group integrations \
		setuptools wheel ninja
	.venv-integrations/bin/python -m pip install --quiet --no-build-isolation \
		-c constraints-integrations.txt deepspeed
	touch $@

clean:
	rm -rf .venv .venv-integrations demo-out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
