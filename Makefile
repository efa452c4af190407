# Everything runs from .venv, which is made on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Several processes share the cores: thread pools of one thread each keep them from fighting over them.
export OMP_NUM_THREADS ?= 1

.PHONY: setup peers engines quickstart test test-slow test-engines test-engines-slow lint types format clean help

help:
	@echo "make quickstart   train the small shop agent (about five minutes on two CPU cores)"
	@echo "make test         run the tests"
	@echo "make engines      install vLLM and SGLang, each in an environment of its own (ENGINES=vllm for one of them)"
	@echo "make test-engines run the tests of the real vLLM and SGLang"
	@echo "make peers        install what the benchmarks compare with, in an environment of its own"
	@echo "make setup | test-slow | lint | types | format | clean"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Millrace needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1 || true); install one and run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing (a few minutes the first time)"
	@$(PIP) install torch==2.13.0
	@$(PIP) install -e '.[dev]'
	@touch $@

# The peers that benchmarks compare with pin other versions than Millrace: they have an environment of their own.
PEERS := .venv-peers

peers: $(PEERS)/.ready

$(PEERS)/.ready:
	@test -x $(PEERS)/bin/python || { echo "Making the virtual environment $(PEERS)"; $(PYTHON) -m venv $(PEERS); }
	@echo "Installing the peers (a few minutes the first time)"
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install torch==2.13.0 TransferQueue==0.1.11 trl==1.16.0
	@touch $@

# Environments of the engines that are servers (docs/engines.md); complete ones are left alone.
ENGINES ?= vllm sglang

engines: setup
	@$(BIN)/python -m rollout_workers.engines.install $(ENGINES)

quickstart: setup
	$(BIN)/millrace train configs/quickstart.yaml run.overwrite=true

test: setup
	$(BIN)/pytest -q -m "not slow and not engines and not engines_slow"

test-engines: setup
	$(BIN)/pytest -q -m engines

test-engines-slow: setup
	$(BIN)/pytest -q -m engines_slow

test-slow: setup
	$(BIN)/pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PEERS) .venv-vllm .venv-sglang build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
