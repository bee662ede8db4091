# make demo    a small model answers a question (builds .venv first)
# make test    linters, types, and every test that needs no GPU
# PYTHON=...   the interpreter for a new .venv: 3.10, 3.11 or 3.12 (the default is the first found, 3.11 preferred)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint format test-cpu test-interpret gpu-test gpu-there sanitize bench report venv venv-dev clean

export MAKE_GOAL := $(firstword $(MAKECMDGOALS))
ifdef PYTHON
export PYTHON
endif

BIN := .venv/bin
# The GPU tests run in any environment that has a CUDA build of torch: make gpu-test GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
export QUESTION ?= What is the capital of France?
PYTEST_ARGS ?=
# One process a core with one thread each: two that share the cores' threads would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal
BENCH_ARGS ?=
SANITIZE_ARGS ?=

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: venv ## a small real model answers QUESTION, streamed, with tokens per second and time to first token
	@$(BIN)/nanovllm generate smollm2 --chat="$$QUESTION" --temperature 0 --stats

test: lint test-cpu test-interpret ## everything that needs no GPU; CI runs this

lint: venv-dev ## ruff check, ruff format --check, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# pytest exits with 5 when it collects nothing, and make fails with it: an empty tier never passes.
test-cpu: venv-dev ## the cpu tier alone (PYTEST_ARGS adds options)
	$(PYTEST) -m "not (interpret or gpu or multi_gpu)" $(PYTEST_ARGS)

# A process of its own: Triton reads TRITON_INTERPRET once, when it is imported.
test-interpret: venv-dev ## Triton's interpreter runs the kernels on the CPU
	TRITON_INTERPRET=1 $(PYTEST) -m interpret $(PYTEST_ARGS)

gpu-there:
	@$(GPU_PYTHON) -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "error: $(GPU_PYTHON) sees no CUDA GPU; run this where there is one, with GPU_PYTHON=python of an environment that has a CUDA build of torch")'

gpu-test: gpu-there ## the gpu tier, in the environment of GPU_PYTHON
	$(GPU_PYTHON) -m pytest -m gpu --require-gpu $(PYTEST_ARGS)

bench: ## the benchmark suite on a CUDA machine, in the environment of GPU_PYTHON (BENCH_ARGS adds options)
	$(GPU_PYTHON) benchmarks/suite.py $(BENCH_ARGS)

sanitize: gpu-there ## every kernel under compute-sanitizer, in the environment of GPU_PYTHON
	$(GPU_PYTHON) tests/sanitize.py $(SANITIZE_ARGS)

report: venv-dev ## plots, tables and the numbers in documents, from benchmarks/bench_results/metrics.csv
	@$(BIN)/python benchmarks/report.py

format: venv-dev ## rewrite the code the way `make lint` wants it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: ## .venv with what the demo needs
	@scripts/venv.sh run

venv-dev: ## .venv with what the tests need as well
	@scripts/venv.sh dev

clean: ## remove .venv, caches and build outputs
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
