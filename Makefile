# Every target sets itself up on a fresh machine with Python and pip alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup browser clang demo test fuzz bench docs wheel sanitize clean

help:
	@echo "make demo   train a digits classifier with crossent, beside PyTorch's loss"
	@echo "make test   everything that CI runs: lint, types, tests, doctests, notebooks"
	@echo "make fuzz   cells of the matrix with fresh seeds: SECONDS=600, SEED= where they start"
	@echo "make bench  time the loss, the fused head and explanations beside their peers"
	@echo "make docs   write the generated pages again (docs/numerics.md, notebooks)"
	@echo "make wheel  build dist/*.whl and try it outside the repository"
	@echo "make quick  lint, types and a core of the tests in a minute: for work in progress"
	@echo "make mutants  does a small change of the code make a test fail? MUTANTS='--sample 0': all"
	@echo "make sanitize  run the kernels' tests under GCC's sanitizers"
	@echo "make models  a tiny model of every family of transformers, plain and patched: docs/models.md"
	@echo "make setup  the virtual environment that the others use"

setup: $(READY)

# No build isolation: an isolated build would download a torch of its own.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools wheel
	$(INSTALL) --no-build-isolation --editable '.[dev,fastai-without-vision]'
	$(INSTALL) --no-deps fastai
	touch $@

demo: setup
	$(BIN)/python examples/digits.py

# The kernels are tested with clang beside GCC, from Debian's packages where there is none yet.
clang:
	@command -v clang++ >/dev/null || { \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends clang; \
	} >/dev/null 2>&1 || echo "NO CLANG COULD BE INSTALLED: the kernels are tested with GCC alone"

# Pages are tested in a real browser, from Debian's packages where there is none yet.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	} >/dev/null 2>&1 || echo "NO BROWSER COULD BE INSTALLED: the tests of the pages will be skipped"

test: setup browser clang
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/backends/contracts.cpp
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Exits with 1 where a cell was wrong; each kind of failure is printed small enough to run alone.
SECONDS ?= 600
fuzz: setup
	$(BIN)/python scripts/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# Peers that ask for any torch, Triton or more: taken without what they ask for.
bench: setup
	-$(INSTALL) --no-deps triton cut-cross-entropy==25.1.1 cleanlab termcolor
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/one_pass.py
	$(BIN)/python benchmarks/lean.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/explain.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/models.py

docs: setup
	$(BIN)/python scripts/numerics.py
	$(BIN)/python scripts/run_notebooks.py

wheel: setup
	$(BIN)/python scripts/wheel.py

# Exits with 1 where a loss or a gradient is wrong. MODELS: names of families; none: all, and the page.
models: setup
	OMP_NUM_THREADS=1 $(BIN)/python scripts/models.py $(MODELS)

sanitize: setup
	$(BIN)/python scripts/wheel.py --sanitize

# The core of the tests is what tests/quick.txt lists.
quick: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/backends/contracts.cpp
	$(MAKE) --jobs 2 --no-print-directory quick-types quick-tests

quick-types: setup
	$(BIN)/mypy

quick-tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --maxfail 5 @tests/quick.txt

# MUTANTS: what scripts/mutants.py --help lists.
mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py $(MUTANTS)

.PHONY: quick quick-types quick-tests mutants models

clean:
	rm -rf $(VENV) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
