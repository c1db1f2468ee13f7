# From nothing to a result: `make demo`, `make test`. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# Known to pass; on some package indexes a CPU build, on others one with CUDA. With a GPU:
# `make TORCH=<yours> ...`, or install it into $(VENV) first; what is there already is kept. torch
# comes before the package, which asks for any.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
WORKERS ?= 2
BENCHES ?= greedy_equality main_job $(notdir $(basename $(wildcard bench/bench_*.py)))

BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.environment-made
INSTALLED := $(VENV)/.package-installed
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find cmake csrc -type f)
HAS = $(BIN)/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("$(1)") is None)'
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install demo test lint types unit wheel sanitize sanitize-gpu format bench check-results clean distclean
.NOTPARALLEL:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1@/p' $(MAKEFILE_LIST) | while IFS=@ read -r t d; do printf '%-13s %s\n' "$$t" "$$d"; done

$(ENVIRONMENT):
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call HAS,torch) || (set -x; $(PIP) $(TORCH))
	@$(call HAS,triton) || (set -x; $(PIP) $(TRITON))
	@touch $@

$(INSTALLED): $(ENVIRONMENT) $(BUILT_FROM)
	$(PIP) --editable '.[test]'
	@touch $@

install: $(INSTALLED) ## environment in .venv, the package built and installed editable

demo: $(INSTALLED) ## the demo model: speculative against plain decoding
	$(BIN)/eesd generate --compare --example math

test: lint types unit wheel ## all that CI checks, from nothing

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

unit: $(INSTALLED) ## the tests, WORKERS processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses $(WORKERS)

wheel: $(INSTALLED) ## build the wheel and try it away from the source
	rm -rf build/lib* build/bdist* dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.ci/try_wheel $(VENV) dist/*.whl

sanitize: $(INSTALLED) ## C++ and its binding under AddressSanitizer and UBSan
	.ci/sanitize $(VENV)

sanitize-gpu: $(INSTALLED) ## every CUDA and Triton kernel at its smallest under compute-sanitizer [REPORT=file]
	.ci/sanitize-gpu $(BIN)/python $(REPORT)

format: $(INSTALLED) ## let ruff rewrite
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(INSTALLED) ## every bench in turn; results go to bench/results
	@for m in $(BENCHES); do $(BIN)/python -m bench.$$m || exit 1; done

check-results: $(INSTALLED) ## every file of bench/results has the form that the benches promise
	$(BIN)/python -m bench.check_results

clean: ## remove what was built
	rm -rf build dist eesd_kernels/_C.*.so *.egg-info python/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(INSTALLED)

distclean: clean ## remove the environment too
	rm -rf $(VENV)
