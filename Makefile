# Every target sets itself up: the first run creates .venv and installs, later runs start at once.
#
#   PYTHON=python3.12 make test      another interpreter (3.10 to 3.13) for a new environment
#   VENV=.venv312 make test          another environment beside the first
#   make test ARGS="-k varlen -x"    further arguments for pytest
#
# torch is the build that pip chooses: on Linux x86-64 the one with CUDA.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,dev,transformers,plot,triton,demo
BENCH_JSON ?= build/bench.json
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all sanitize lint format bench clean

help:
	@echo 'make demo      run real models through vllm_accel on this machine and explain the choice'
	@echo 'make test      the tests for every change (minutes)'
	@echo 'make test-all  every test'
	@echo 'make sanitize  the CPU kernels built with the address and undefined behaviour sanitizers, over every case'
	@echo 'make lint      ruff and mypy'
	@echo 'make format    let ruff rewrite what it can'
	@echo 'make bench     benchmarks, saved as $(BENCH_JSON)'
	@echo 'make setup     only create $(VENV)'
	@echo 'make clean     remove $(VENV), build products and caches'

setup: $(STAMP)

demo: $(STAMP)
	$(PY) -m vllm_accel.cli.demo $(ARGS)

test: $(STAMP)
	$(PY) tests/run.py -q -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(PY) tests/run.py -q $(ARGS)

sanitize: $(STAMP)
	$(PY) -m pytest -q tests/test_cpu_build.py -k sanitizers $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	@mkdir -p $(dir $(BENCH_JSON))
	$(PY) -m pytest -q benchmarks --benchmark-only --benchmark-json=$(BENCH_JSON) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# The editable install is repeated when what it depends on changes. setuptools goes in first and build isolation
# off, so that the build uses the pinned version and downloads it once.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.hpp)
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("Python %d.%d does not do: vllm-accel needs 3.10 to 3.13. Try: make PYTHON=python3.12 ..." % v)' \
	  && echo 'creating $(VENV)' && $(PYTHON) -m venv --clear $(VENV); }
	@echo 'installing into $(VENV): minutes the first time'
	$(PY) -m pip install -q -c constraints.txt setuptools
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@
