# make train   set up, then train a small network on real digits: float, PTQ, QAT
# make test    set up, then the linters and all tests
# make bench   set up, then the benchmarks against the peers
# Everything lands in $(VENV); nothing outside this folder is touched.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fastqat-installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/cpu/*)

.PHONY: train test lint bench setup clean

train: setup
	$(BIN)/fastqat train

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-disable-gc --results benchmarks/results

setup: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel torch numpy
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[train,test,bench,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fastqat/_C*
