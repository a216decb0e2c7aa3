# `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-integrations test-oldest test-published golden fuzz bench bench-gpu studies docs dist clean

demo: .venv/ready
	$(BIN)/gradclip demo --out demo-out $(ARGS)

# Sharded tests start processes of their own, which wait for one another half of the time.
test: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/test_sharded.py > .sharded.log 2>&1 & sharded=$$!; \
	$(PYTEST) -n 2 --dist loadgroup --ignore tests/test_sharded.py $(ARGS); others=$$?; \
	wait $$sharded; sharded=$$?; cat .sharded.log; test $$others = 0 -a $$sharded = 0

# The trainers are large, and have an environment of their own.
test-integrations: .venv-integrations/ready
	.venv-integrations/bin/python -m pytest -W default tests/integrations $(ARGS)

# The oldest releases that the extras allow. (This transformers takes no Keras 3 beside it.)
test-oldest: .venv-oldest/ready
	USE_TF=0 .venv-oldest/bin/python -m pytest -W default tests/integrations $(ARGS)

# Published clippers, to see them fail as tests/published.py says, or agree.
test-published: .venv-published/ready
	.venv-published/bin/python -m pytest -W default tests/witnesses $(ARGS)

# As in the tests, and with every rule compiled by inductor and by JAX: some minutes.
golden: .venv/ready
	GRADCLIP_GOLDEN=1 $(PYTEST) -n 2 --dist loadgroup tests/test_twins.py tests/test_jax.py $(ARGS)
	GRADCLIP_GOLDEN=1 $(PYTEST) tests/test_sharded.py

fuzz: .venv/ready
	GRADCLIP_FUZZ_EXAMPLES=7000 $(PYTEST) -n 2 tests/test_fuzz.py $(ARGS)

bench: .venv/ready
	$(BIN)/python -m benchmarks $(ARGS)

# On a GPU; ARGS="--device cpu" only tries the lines.
bench-gpu: .venv/ready
	$(BIN)/python -m benchmarks.accelerator $(ARGS)

# About 25 CPU minutes; what is in docs/studies already is not computed again.
studies: .venv/ready
	for name in $$($(BIN)/gradclip study | cut -d' ' -f1); do \
		$(BIN)/gradclip study $$name --out docs/studies $(ARGS) || exit 1; done
	$(BIN)/gradclip study --page docs/studies.md --out docs/studies
	$(BIN)/gradclip study --page docs/advice.md --out docs/studies

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

.venv-integrations/ready .venv-oldest/ready: \
.venv-%/ready: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-$*/bin/python -m pip install --quiet -c constraints-$*.txt \
		-e ".[report,lightning,transformers,accelerate,keras,jax]" \
		--group integrations setuptools wheel ninja
	.venv-$*/bin/python -m pip install --quiet --no-build-isolation \
		-c constraints-$*.txt deepspeed
	# For one file of it; the torchvision it asks for has no build for torch's CPU one.
	.venv-$*/bin/python -m pip install --quiet --no-deps -c constraints-$*.txt timm
	touch $@

.venv-published/ready: pyproject.toml constraints.txt constraints-published.txt
	$(PYTHON) -m venv .venv-published
	.venv-published/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-published/bin/python -m pip install --quiet -c constraints.txt \
		-e ".[torch,jax]" pytest
	# Without what else they need, of which torch is all that is used here.
	.venv-published/bin/python -m pip install --quiet --no-deps \
		-r constraints-published.txt
	touch $@

# One of them wants an old jsonschema, and so they have an environment of their own.
.venv-dist/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-dist/bin/python -m pip install --quiet -c constraints.txt --group release
	touch $@

clean:
	rm -rf .venv .venv-dist .venv-integrations .venv-oldest .venv-published demo-out \
		site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
