# `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-integrations fuzz bench docs dist clean

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

# Its theme is at the end of its life in 2027, and says so at every build.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Builds the wheel from the sdist, and uses it where nothing else is.
dist: .venv-dist/ready
	.venv-dist/bin/cffconvert --validate -i CITATION.cff
	rm -rf dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python .ci/check_wheel.py dist/*.whl

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

# One of them wants an old jsonschema, and so they have an environment of their own.
.venv-dist/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-dist/bin/python -m pip install --quiet -c constraints.txt --group release
	touch $@

clean:
	rm -rf .venv .venv-dist .venv-integrations demo-out site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
