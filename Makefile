# Needs make and a python3 of 3.10 or later; the rest goes into .venv. A torch that python3 has is used, see tools/make_venv.py.
#
#   make demo          train a small language model with the module and show what it learned
#   make test          run the tests: on the GPU if there is one, else on the CPU (Triton under its interpreter)
#   make lint          formatters, linters, types
#   make build         a wheel in dist/
#   make bench         the benchmark of the op (GPU)
#   make bench-module  the benchmark of the module (GPU)
#   make sanitize      compute-sanitizer over a short matrix of shapes (GPU)
#   make clean

ifndef PYTHON # found before .venv/bin comes first in PATH
PYTHON := $(shell command -v python3)
endif
VENV := .venv
# The newest build for CUDA is gigabytes: without a GPU, one version that is known to work.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
PYTEST_ARGS ?=
BENCH_ARGS ?=

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

csrc := $(shell find csrc -type f)
clang_formatted := $(shell find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')
sanitizers := memcheck racecheck initcheck synccheck

.PHONY: demo test lint build bench bench-module sanitize install clean

demo: install
	python examples/byte_lm.py

test: install
	python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/linters
	ruff format --check .
	ruff check .
	clang-format --dry-run -Werror $(clang_formatted)
	mypy

build: install
	python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

bench: install
	python -m benchmarks.bench_selected_attention $(BENCH_ARGS)

bench-module: install
	python -m benchmarks.bench_nsa_module $(BENCH_ARGS)

sanitize: install
	for tool in $(sanitizers); do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 python tests/sanitize.py || exit; \
	done

install: $(VENV)/installed

clean:
	rm -rf build dist *.egg-info $(VENV) fsa/_C.so fsa/_build_info.py .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/torch:
	$(PYTHON) tools/make_venv.py $(VENV) "$(TORCH)"
	touch $@

# Editable: Python sources are live; this runs again when what is compiled has changed.
$(VENV)/installed: $(VENV)/torch setup.py pyproject.toml CMakeLists.txt $(csrc)
	python -m pip install --quiet "setuptools>=77" "cmake>=3.26" ninja
	@echo "Installing fsa. With nvcc the CUDA kernels are compiled, which takes minutes the first time ..."
	python -m pip install --quiet --no-build-isolation --editable ".[test,demo,bench]"
	python -m fsa
	touch $@

$(VENV)/linters: $(VENV)/installed
	python -m pip install --quiet --no-build-isolation --editable ".[lint]"
	touch $@
