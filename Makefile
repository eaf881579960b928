# `make demo` and `make test` do all set-up themselves on a machine with Python >= 3.11, make and a C/C++ compiler.
# ENGINE=auto|cpu|gpu chooses the vLLM build; ARGS="-k pattern" goes to pytest; PYTHON=... names an interpreter.
.DEFAULT_GOAL := help
.NOTPARALLEL:
# What depends on vLLM, and two families of models against Transformers on the real engine.
OLDEST := tests/worker $(addprefix --ignore=tests/worker/test_,attention.py gpu.py native.py) \
  tests/test_doctor.py tests/test_middleware.py tests/integration/test_versions.py \
  tests/integration/test_families.py::test_attention_and_logits_equal_eager

# Two processes where there are two cores; ARGS=-n0 is one, as a debugger needs it.
PYTEST := -m pytest -n auto --dist loadscope --no-loadscope-reorder

.PHONY: help demo test oldest phoenix jaeger bench lint types model venv clean

ENGINE ?= auto
ARGS ?=
BIN := .venv/bin

# The first interpreter that runs and is new enough; one that carries the headers torch.compile needs goes first.
PROBE := import os, sys, sysconfig; h = os.path.join(sysconfig.get_path("include"), "Python.h"); \
  sys.exit(not ((3, 11) <= sys.version_info < (3, 15) and (os.path.exists(h) or "any" in sys.argv)))
ifndef PYTHON
PYTHON := $(shell for want in headers any; do for p in python3.11 python3 python3.12 python3.13 python3.14; do \
  if $$p -c '$(PROBE)' $$want 2>/dev/null; then echo $$p; exit; fi; done; done)
endif

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv ## serve a small model, trace and capture a chat, print what was recorded
	@$(BIN)/python deploy/demo.py

test: lint types ## everything CI runs: lint, types, architecture, all tests with a real engine
	@$(BIN)/python deploy/model.py gemma-3-270m
	@$(BIN)/python -m deploy.phoenix --install
	@$(BIN)/python $(PYTEST) $(ARGS)

oldest: ## the tests of what touches vLLM, on the oldest version that is supported
	@$(MAKE) --no-print-directory venv OLDEST_VENV=--oldest
	@.venv/oldest/bin/python $(PYTEST) $(OLDEST) -k "not equal_eager or llama or gemma2" $(ARGS)

phoenix: venv ## Arize Phoenix, a trace backend with a UI, on 127.0.0.1 (ARGS="--port 6006 --grpc-port 4317")
	@$(BIN)/python -m deploy.phoenix $(ARGS)

jaeger: ## Jaeger with our view of spans, on 127.0.0.1 (needs Docker)
	@deploy/jaeger/start.sh $(ARGS)

bench: venv ## tensorspan beside plain vLLM: tables, bench.json, bench.svg (ARGS=--quick: about 8 minutes)
	@$(BIN)/python -m tests.benchmarks.bench $(ARGS)

lint: venv ## ruff and the import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports

types: venv ## mypy --strict
	@$(BIN)/mypy

model: venv ## convert the demo model into the user's cache
	@$(BIN)/python deploy/model.py

venv: ## .venv from the pinned lock (about a second when nothing changed)
	@if [ -z "$(PYTHON)" ]; then \
	  echo "tensorspan: no Python 3.11 to 3.14 found; install one (Debian: sudo apt install python3-dev python3-venv) or set PYTHON=/path/to/python" >&2; \
	  exit 1; fi
	@$(PYTHON) deploy/bootstrap.py --engine $(ENGINE) $(OLDEST_VENV)

clean: ## remove .venv, builds and caches; captures and the converted model stay
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find tracer exporters tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +
