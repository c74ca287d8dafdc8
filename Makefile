# Each target makes .venv from pyproject's extras when needed, says what it does, and is fast the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# One stamp an extra: pyproject.toml or constraints.txt changed, so install again.
$(VENV)/.made:
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.made pyproject.toml constraints.txt
	@echo "== installing rectilinear[$*] into $(VENV)"
	@$(INSTALL) -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-examples  ## train the two-layer net under every usable backend; ends with a table and a picture
	@echo "== training a two-layer net on handwritten digits under every usable backend"
	@$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test  ## the tests that need no large library
	@echo "== running the tests"
	@$(BIN)/python -m pytest -q -m 'not libraries and not browser and not cuda' --junitxml=out/test.xml

test-all: $(VENV)/.installed-test $(VENV)/.installed-peers  ## the tests on torch, JAX and dask arrays
	@echo "== running the tests on torch, JAX and dask arrays"
	@$(BIN)/python -m pytest -q -m libraries --junitxml=out/test-all.xml

lint: $(VENV)/.installed-test $(VENV)/.installed-lint  ## ruff, mypy, doctests
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy --strict"
	@$(BIN)/mypy
	@echo "== doctests of docstrings, README and docs"
	@$(BIN)/python -m pytest -q -o testpaths= --doctest-modules --doctest-glob='*.md' --ignore=rectilinear/measure/peers rectilinear README.md docs

wheel: $(VENV)/.installed-lint  ## build a wheel, install it into an empty environment, try it there
	@echo "== building a wheel and trying it outside of the checkout"
	@$(BIN)/python tools/check_wheel.py

# On Linux, pip fetches a PyTorch of several gigabytes unless one is there; the README says how to bring your own.
bench: $(VENV)/.installed-peers  ## measure the backends against other libraries, quick grid (3 minutes); report in rectilinear-bench/
	@echo "== measuring the quick grid with peers"
	@$(BIN)/python -m rectilinear bench quick --peers $(BENCH)

bench-full: $(VENV)/.installed-peers  ## the whole grid (30 minutes); any part: make bench-full BENCH="--only 'step-*-float32'"
	@echo "== measuring the whole grid with peers"
	@$(BIN)/python -m rectilinear bench full --peers $(BENCH)

fuzz: $(VENV)/.installed-test  ## random calls on guarded memory, for a minute; longer: make fuzz FUZZ="--seconds 600"
	@echo "== fuzzing every public function on every instruction set of this host"
	@$(BIN)/python -m tests.fuzz $(FUZZ)

fuzz-mutants: $(VENV)/.installed-test  ## plant bugs one by one and see the fuzzing find each (20 minutes)
	@$(BIN)/python -m tests.fuzz.mutants

test-browser: $(VENV)/.installed-test  ## look at the benchmark report in headless Chromium, which has to be installed
	@echo "== looking at the report in Chromium"
	@$(BIN)/python -m pytest -q -m browser --junitxml=out/test-browser.xml

# An environment of its own: everything else is to be tested where CuPy is not installed.
test-cuda:  ## compile the CUDA kernels for real and run them on the CPU, without a GPU; needs g++
	@$(MAKE) --no-print-directory VENV=.venv-cuda .venv-cuda/.installed-cuda-ci
	@echo "== compiling the CUDA kernels, and running them on the CPU"
	@.venv-cuda/bin/python -m pytest -q -m cuda --junitxml=out/test-cuda.xml tests/cuda

cuda-mutants:  ## plant bugs into the CUDA kernels one by one and see each found (10 minutes)
	@$(MAKE) --no-print-directory VENV=.venv-cuda .venv-cuda/.installed-cuda-ci
	@.venv-cuda/bin/python -m tests.cuda.mutants

gpu-check:  ## on a machine with a GPU, CuPy and NumPy: prove the cupy backend there; writes one JSON
	@$(PYTHON) tools/gpu_check.py

clean:  ## remove what the targets made
	rm -rf $(VENV) .venv-cuda out build dist rectilinear-bench

.PHONY: help demo test test-all fuzz fuzz-mutants test-browser test-cuda cuda-mutants gpu-check lint wheel bench bench-full clean
