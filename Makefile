# `make demo` and `make test` do all the set-up; `make help` lists the rest.
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.14.1
PYTHON ?= python3
ARGS ?=
TESTS ?= tests

BIN := .venv/bin
PIP := -m pip --quiet --disable-pip-version-check
BUILD_TOOLS := 'setuptools>=70' wheel pybind11 'cmake>=3.24' ninja numpy
LINT_TOOLS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f)
CXX := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))
# Stamps carry what was asked for in their names, so that another torch or another linter is another set-up.
tag = $(shell echo '$(1)' | tr -cs '[:alnum:].\n' -)
TOOLS := .venv/tools-$(call tag,$(TORCH))
BUILT := .venv/built-$(call tag,$(TORCH) $(LECT11EXT_CUDA) $(LECT11EXT_CUDA_ARCHITECTURES) $(LECT11EXT_CPU_BUILDS))
LINTERS := .venv/linters-$(call tag,$(LINT_TOOLS))

export PATH := $(CURDIR)/$(BIN):$(PATH)
.PHONY: help demo dates sunspots autoencoders test nightly sanitize bench cuda gpu-check gpu-peers lint format wheel compat oldest newest link clean
.SILENT:

help:  ## this list
	grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(TOOLS): Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	rm -f .venv/tools-* .venv/built-*
	echo "Installing $(TORCH) into .venv ..."
	$(BIN)/python $(PIP) install --upgrade pip
	$(BIN)/python $(PIP) install $(TORCH) $(BUILD_TOOLS)
	touch $@

# The first command shows its progress; the second links again and installs.
$(BUILT): $(TOOLS) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	PYTHONWARNINGS=ignore $(BIN)/python $(PIP) install --no-build-isolation --editable '.[test,bench,examples]'
	rm -f .venv/built-*
	touch $@

$(LINTERS): $(TOOLS)
	$(BIN)/python $(PIP) install $(LINT_TOOLS)
	touch $@

demo: $(BUILT)  ## trains four models on real data, prints a table, draws pictures into out/
	$(BIN)/python examples/quickstart.py $(ARGS)

dates: $(BUILT)  ## the part of the demo that attends: dates of many languages to ISO 8601
	$(BIN)/python examples/translate_dates.py $(ARGS)

sunspots: $(BUILT)  ## forecasts sunspots with a GRU, beside an autoregression, in a few seconds
	$(BIN)/python examples/sunspots.py $(ARGS)

autoencoders: $(BUILT)  ## the lecture's autoencoders on digits, each beside what it improves on, in a minute
	$(BIN)/python examples/digits_autoencoders.py $(ARGS)

# Several processes of two threads each. Idle ones sleep: spinning, they would take the cores from one another.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=passive $(CURDIR)/$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test: $(BUILT)  ## the tests (ARGS="-k lstm" or TESTS=tests/attention for some)
	$(PYTEST) $(TESTS) -m 'not slow' $(ARGS)

nightly: $(BUILT)  ## the long sweeps
	$(PYTEST) $(TESTS) -m slow $(ARGS)

# A copy of the tree: the module beside it is built with -O1, and the compiler's checks.
SANITIZE ?= address
SANITIZED := build/sanitize-$(SANITIZE)
SANITIZER := -O1 -g1 -DNDEBUG -fno-omit-frame-pointer -fsanitize=$(SANITIZE) -fno-sanitize=vptr -fno-sanitize-recover
SANITIZER_RUNTIME = $$(g++ -print-file-name=lib$(if $(findstring address,$(SANITIZE)),asan,ubsan).so) $$(g++ -print-file-name=libstdc++.so)

sanitize: $(BUILT)  ## the tests, of emulated CUDA too, under AddressSanitizer, or what SANITIZE=undefined finds
	mkdir -p $(SANITIZED)
	git ls-files -z | xargs -0 cp --parents --preserve=timestamps -t $(SANITIZED)
	cmake -G Ninja -S $(SANITIZED) -B $(SANITIZED)/build -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DLECT11EXT_OUTPUT=$(CURDIR)/$(SANITIZED)/lect11ext -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS='$(SANITIZER)'
	cmake --build $(SANITIZED)/build --parallel $${MAX_JOBS:-$$(nproc)}
	cd $(SANITIZED) && PYTHONPATH=. SANITIZE=$(SANITIZE) LD_PRELOAD="$(SANITIZER_RUNTIME)" \
	  ASAN_OPTIONS=detect_leaks=0 $(PYTEST) $(TESTS) -m 'not slow' $(ARGS)

bench: $(BUILT)  ## all benchmarks and one table of ratios
	$(BIN)/python -m bench $(ARGS)

cuda:  ## compiles every .cu with nvcc alone: registers and spills of each kernel
	$(PYTHON) tools/cuda_report.py --jobs $$(nproc) $(ARGS)

# With the Python that has torch for the GPU, and not with .venv.
gpu-check:  ## on a machine with a GPU: builds, tests, sanitizes and measures the CUDA kernels (GPU_ONLY=attention)
	$(PYTHON) tools/gpu_check.py $(ARGS)

gpu-peers:  ## packages to measure against on a GPU, into out/peers, which is to be carried to it
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target out/peers flashrnn einops

lint: $(LINTERS)  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX)
	$(BIN)/mypy

format: $(LINTERS)  ## rewrites the files as lint wants them
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX)

# A throw-away environment with torch $(1): the package is built with LECT11EXT_CUDA=$(2), and runs one call.
CALL := import torch, lect11ext.functional as f; \
        z, kl = f.gaussian_rsample_kl(torch.zeros(2, 3), torch.zeros(2, 3)); \
        assert z.shape == (2, 3) and not kl.any()
define try
	echo "Building with $(1), LECT11EXT_CUDA=$(2) ..."
	rm -rf build/try
	$(PYTHON) -m venv build/try/venv
	build/try/venv/bin/python $(PIP) install $(1) $(BUILD_TOOLS)
	PATH="$(CURDIR)/build/try/venv/bin:$$PATH" LECT11EXT_CUDA=$(2) build/try/venv/bin/python setup.py --quiet \
	  egg_info --egg-base build/try build --build-lib build/try/lib
	cd build/try/lib && ../venv/bin/python -m lect11ext && ../venv/bin/python -c "$(CALL)"
endef

compat: oldest newest  ## compiles the C++ side against the oldest and the newest torch

oldest:
	$(call try,torch==2.11.0,0)
	rm -rf build/try

newest:
	$(call try,torch,0)
	rm -rf build/try

# For one architecture, and one of the CPU kernels' builds: `make cuda` and `make wheel` compile all of them.
link: export LECT11EXT_CUDA_ARCHITECTURES ?= 90a
link: export LECT11EXT_CPU_BUILDS ?= default
link:  ## compiles and links the whole CUDA extension against a CUDA build of torch; needs nvcc, no GPU
	$(call try,$(CUDA_TORCH),1)
	cd build/try/lib && ../venv/bin/python -m lect11ext --json | grep -q '"cuda": true'
	rm -rf build/try

wheel: $(TOOLS)  ## builds a wheel into dist/ and runs it in a clean environment
	rm -rf build/lib.* build/bdist.* build/wheel dist
	$(BIN)/python $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python $(PIP) install $(TORCH) dist/*.whl
	cd build/wheel && bin/python -m lect11ext && bin/python -c "$(CALL)"
	rm -rf build/wheel

clean:  ## removes what make has made, except out/
	rm -rf .venv build dist *.egg-info lect11ext/_C.*.so
