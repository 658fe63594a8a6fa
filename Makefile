# make train   set up, then train a small network on real digits: float, PTQ, QAT
# make test    set up, then the linters and all tests
# make bench   set up, then the benchmarks against the peers
# make gpu     on a machine with an NVIDIA GPU: builds, tests and measures there, without a network; see docs/gpu.md
# Everything lands in $(VENV); nothing outside this folder is touched.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fastqat-installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*.*)

.PHONY: train test lint bench gpu setup clean

train: setup
	$(BIN)/fastqat train

test: setup lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.cpp csrc/cuda/*.h tests/cuda_on_host/*.*[hpu]
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-disable-gc --results benchmarks/results

gpu:
	$(PYTHON) scripts/gpu.py $(ARGS)

setup: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel torch numpy
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[train,test,bench,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fastqat/_C*
