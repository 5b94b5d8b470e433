# Every target does its own set-up: a virtual environment in .venv with pinned packages.
#   make demo [DATA=events.parquet] [ARGS='--action rating …']   the whole way, ends with answers from a live server
#   make test                                                    the tests
#   make check                                                   lint, types and tests
#   make gpu-check [GPU_PYTHON=python3] [ARGS=--quick]           tests and timings on a GPU; says so where there is none
#   make gpu-tune [GPU_PYTHON=python3] [ARGS='--widths 64']      measure the kernels' launches on this GPU and keep the best
PYTHON ?= python3
VENV ?= .venv
# Packages beside the core: `cpu` (faiss-cpu) or `gpu` (faiss-gpu), and what tests and checks need.
EXTRAS ?= cpu,dev,otel,redis,s3
OUT ?= demo
BIN := $(VENV)/bin

comma := ,
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))

.PHONY: help setup demo test lint types check stubs clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(BIN)/retrieval demo $(DATA) --out $(OUT) $(ARGS)

# A process per core, each with whole files, so that what a file's tests share is made once.
test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python protos/check.py

types: setup
	$(BIN)/mypy

check: lint types test


# GPU_PYTHON: a Python that has the packages already, in place of the virtual environment.
.PHONY: gpu-check gpu-tune
gpu-check: $(if $(GPU_PYTHON),,setup)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu_check $(ARGS)

gpu-tune: $(if $(GPU_PYTHON),,setup)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.tune_kernels $(ARGS)

# The gRPC stubs are committed; a test compares them with what the proto gives. `make lint` compares the proto with the
# interface that was released, protos/v1.binpb.
stubs: setup
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
