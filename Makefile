# Everything runs in $(VENV), made from constraints.txt: what was tested together.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two threads that spin collapse beside a busy neighbour, so waiting is passive everywhere, after a few microseconds.
export OMP_WAIT_POLICY = PASSIVE
export GOMP_SPINCOUNT = 1000
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo test reliability docs-test adapters lint types check docs notebooks dist assets gpu gpu-wheels clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

install: $(STAMP)  ## Make the virtual environment (once; again only where the files it is made from change).

# Torch goes first and by its pin: a range could bring another build of it than the one that was tested.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	touch $@

demo: $(STAMP)  ## Compare PPO, GRPO and best-of-n on the embedded corpus: runs/demo/report.html.
	$(BIN)/python examples/demo.py --out runs/demo

test: $(STAMP)  ## Run the tests: two workers, one thread each.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

reliability: $(STAMP)  ## Run the long tests: known optima, real models, hacked rewards, kills, bad inputs, flat memory.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(ARGS)

# The script alone, of the package that brings it up to date: its playwright is not needed.
AXE := build/axe/axe_playwright_python/axe.min.js
$(AXE): $(STAMP)
	$(BIN)/python -m pip install --no-deps --target build/axe axe-playwright-python==0.1.8

docs-test: $(STAMP) $(AXE)  ## Run every page's Python as it is printed, with small budgets; look for barriers (axe-core).
	OMP_NUM_THREADS=1 TEXTRL_GYM_AXE=$(AXE) $(BIN)/python -m pytest -n 2 -m slow tests/test_docs.py tests/test_readme.py \
	    tests/test_run_page.py tests/test_accessibility.py tests/test_annotate.py $(ARGS)

# The packages of others pin what ours leave open, so they have environments of their own; openenv's pins exclude trl's,
# and moviepy wants a Pillow below the pinned one.
ADAPTERS := build/adapters
$(ADAPTERS)/others/.installed: EXTRAS = torchrl,textarena,trl,verifiers
$(ADAPTERS)/openenv/.installed: EXTRAS = openenv
$(ADAPTERS)/habits/.installed: EXTRAS = sb3
$(ADAPTERS)/habits/.installed: BESIDE = moviepy rl_zoo3 array-api-compat
$(ADAPTERS)/%/.installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/python -m pip install -e '.[$(EXTRAS)]' $(BESIDE) pytest pytest-xdist hypothesis
	touch $@

# A file at a time: pytest fails where it has skipped all of one, which lacks its package then.
adapters: $(ADAPTERS)/others/.installed $(ADAPTERS)/openenv/.installed $(ADAPTERS)/habits/.installed  ## Run the adapters against the packages themselves.
	for name in torchrl textarena trl verifiers; do \
	    OMP_NUM_THREADS=1 $(ADAPTERS)/others/bin/python -m pytest -q tests/test_$$name.py || exit 1; done
	OMP_NUM_THREADS=1 $(ADAPTERS)/openenv/bin/python -m pytest -q tests/test_openenv.py
	OMP_NUM_THREADS=1 $(ADAPTERS)/habits/bin/python -m pytest -q tests/test_habits.py

lint: $(STAMP)  ## Check style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Check types.
	$(BIN)/mypy

docs: $(STAMP)  ## Build the documentation into site/, with warnings as errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(STAMP)  ## Write the tutorials and the lecture as notebooks: build/notebooks/.
	$(BIN)/python tests/run_page.py --notebooks build/notebooks

# Twine has an environment of its own: what it needs to upload is nobody else's.
TWINE := build/twine/bin/python
$(TWINE):
	$(PYTHON) -m venv build/twine
	$(TWINE) -m pip install "twine>=6.1"

dist: $(STAMP) $(TWINE)  ## Build the source distribution and the wheel, and check them as an index would: dist/.
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(TWINE) -m twine check --strict dist/*

check: lint types docs test  ## All that CI holds.

assets: $(STAMP)  ## Rebuild the embedded models of every environment.
	$(BIN)/python -m textrl_gym.pipeline.build_assets

# Without the virtual environment too: a machine with a GPU has a Python of its own, whose torch is to be used.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:  ## Prove, measure and write down what a GPU gives, in nine minutes: runs/gpu/result.json.
	$(GPU_PYTHON) -m gpu.run --out runs/gpu $(ARGS)

gpu-wheels:  ## Collect what a machine with a GPU and torch alone lacks: .whl/
	$(GPU_PYTHON) -m gpu.wheels --out .whl $(ARGS)

clean:  ## Remove what the other targets write, except the virtual environment and runs/.
	rm -rf build dist site *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find textrl_gym agents envs tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
