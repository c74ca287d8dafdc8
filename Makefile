# Each target makes .venv from pyproject's extras when needed, says what it does, and is fast the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
# What is installed is compiled as it is imported: most of it never is, and all of it takes a minute.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
# Two at a time, whatever the host: most tests are one thread's work, and the others use all cores for themselves.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist worksteal
# Doctests that need a large library: make test-all runs them, make lint leaves them out.
LIBRARY_DOCTESTS := rectilinear/torch rectilinear/jax.py rectilinear/dask.py
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# One stamp an extra: pyproject.toml or constraints.txt changed, so install again.
$(VENV)/.made:
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.made pyproject.toml $(CONSTRAINTS)
	@echo "== installing rectilinear[$*] into $(VENV)"
	@$(INSTALL) -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-examples  ## train the two-layer net under every usable backend; ends with tables and two pictures
	@echo "== training a two-layer net on handwritten digits under every usable backend"
	@$(BIN)/python examples/demo.py

demo-dask: $(VENV)/.installed-examples $(VENV)/.installed-dask  ## train over worker processes of a Dask cluster, on more data than they have memory for
	@echo "== training a two-layer net over worker processes, one of which is killed on the way"
	@$(BIN)/python examples/two_layer_net_dask.py

# Kernels of the two dtypes compile side by side first, since two processes that test would both compile what they both need.
kernels: $(VENV)/.installed-test
	@echo "== compiling kernels, where they are not on disk"
	@printf '%s\n' float32 float64 | xargs -P 2 -I DTYPE $(BIN)/python -c 'import rectilinear; rectilinear.warmup(["DTYPE"])'

test: kernels  ## the tests that need no large library (6 minutes)
	@echo "== running the tests"
	@$(PYTEST) -m 'not libraries and not browser and not cuda and not nightly and not alone and not docs' --junitxml=out/test.xml
	@$(BIN)/python -m pytest -q -m alone --junitxml=out/test-alone.xml tests/test_threads.py

test-smoke: $(VENV)/.installed-smoke  ## a quick subset of the tests, across all layers
	@echo "== running the smoke subset in $(VENV)"
	@$(BIN)/python -m pytest -q -m 'smoke and not libraries and not cuda' --junitxml=out/smoke$(VENV).xml

# Environments of their own, beside $(VENV).
test-floor:  ## the smoke subset with the lowest versions that pyproject.toml allows
	@$(MAKE) --no-print-directory VENV=.venv-floor CONSTRAINTS=.venv-floor/floors.txt test-smoke

.venv-floor/floors.txt: pyproject.toml constraints.txt tools/requirements.py | .venv-floor/.made
	@.venv-floor/bin/python tools/requirements.py --floors smoke > $@

test-arm: $(VENV)/.made  ## the NEON kernels in an emulator, on x86 Debian (20 minutes, less when compiled)
	@$(BIN)/python tools/arm.py

nightly: $(VENV)/.installed-test $(VENV)/.installed-peers  ## what takes longer than make test has (2 to 3 hours, of which planted bugs take most)
	@echo "== running the tests that take long"
	@$(PYTEST) -m 'nightly and not cuda and not libraries' --junitxml=out/nightly.xml
	@$(PYTEST) -m 'nightly and libraries' --junitxml=out/nightly-libraries.xml
	@$(MAKE) --no-print-directory fuzz FUZZ="--seconds 300"
	@$(MAKE) --no-print-directory release-check test-floor
	@$(MAKE) --no-print-directory test-arm
	@$(MAKE) --no-print-directory test-cuda
	@.venv-cuda/bin/python -m pytest -q -m 'cuda and nightly' --junitxml=out/nightly-cuda.xml tests/cuda
	@$(MAKE) --no-print-directory cuda-mutants
	@$(MAKE) --no-print-directory kernel-mutants
	@$(MAKE) --no-print-directory fuzz-mutants

test-all: $(VENV)/.installed-test $(VENV)/.installed-peers  ## the tests on torch, JAX and dask arrays
	@echo "== running the tests on torch, JAX and dask arrays"
	@$(PYTEST) -m 'libraries and not nightly' --junitxml=out/test-all.xml
	@$(BIN)/python -m pytest -q -o testpaths= --doctest-modules $(LIBRARY_DOCTESTS)

lint: $(VENV)/.installed-test $(VENV)/.installed-lint kernels  ## ruff, mypy, doctests
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy --strict"
	@$(BIN)/mypy
	@echo "== doctests of docstrings"
	@$(BIN)/python -m pytest -q -o testpaths= --doctest-modules --ignore=rectilinear/measure/peers $(LIBRARY_DOCTESTS:%=--ignore=%) rectilinear

docs: $(VENV)/.installed-test $(VENV)/.installed-docs  ## build the documentation into out/site; warnings are errors
	@echo "== building the documentation"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@$(BIN)/python -m pytest -q -m 'docs and not browser' --junitxml=out/test-docs.xml tests/test_site.py
	@$(BIN)/python -m tests.documents
	@echo "== done: out/site/index.html"

release-check: $(VENV)/.installed-lint  ## build sdist and wheel, check them, try both installed under every CPython here; RELEASE_CHECK=--quick: the bare wheel, under the newest
	@echo "== building sdist and wheel, and trying them outside of the checkout"
	@$(BIN)/python tools/release_check.py $(RELEASE_CHECK)

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

kernel-mutants: $(VENV)/.installed-test  ## plant bugs one by one and see the test that is named for each fail (20 minutes)
	@$(BIN)/python -m tests.mutants

test-browser: docs  ## look at the documentation and the benchmark report in headless Chromium, which has to be installed
	@echo "== looking at the documentation and the report in Chromium"
	@$(BIN)/python -m pytest -q -m browser --junitxml=out/test-browser.xml

# An environment of its own: everything else is to be tested where CuPy is not installed.
cuda-environment:
	@$(MAKE) --no-print-directory VENV=.venv-cuda .venv-cuda/.installed-cuda-ci

test-cuda: cuda-environment  ## compile the CUDA kernels for real and run them on the CPU, without a GPU; needs g++
	@echo "== compiling the CUDA kernels, and running them on the CPU"
	@.venv-cuda/bin/python -m pytest -q -n 2 --dist worksteal -m 'cuda and not nightly' --junitxml=out/test-cuda.xml tests/cuda bench/test_bench_host_cost.py

cuda-mutants: cuda-environment  ## plant bugs into the CUDA kernels one by one and see each found (an hour)
	@.venv-cuda/bin/python -m tests.cuda.mutants

gpu-check:  ## on a machine with a GPU: prove and measure the cupy backend there in six minutes; in two: make gpu-check GPU_CHECK=--first
	@$(PYTHON) tools/gpu_check.py $(GPU_CHECK)

clean:  ## remove what the targets made
	rm -rf $(VENV) .venv-cuda .venv-floor .venv-py3.* .arm out build dist rectilinear-bench

.PHONY: help demo demo-dask kernels test test-smoke test-floor test-arm nightly fuzz fuzz-mutants kernel-mutants test-all test-browser cuda-environment test-cuda cuda-mutants gpu-check lint docs release-check bench bench-full clean
