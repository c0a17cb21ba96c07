# `make demo` and `make test` are all a newcomer needs; both set up .venv first if it is missing.
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo demo-quick test test-all test-unit test-faults soak check bench gpu-check format lock clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(READY): requirements/cpu.lock scripts/setup.sh
	@bash scripts/setup.sh

setup: $(READY)  ## make .venv (minutes the first time, nothing afterwards)

demo: $(READY)  ## the whole recipe on a tiny model, here, in ten minutes
	@$(BIN)/rayrlhf run configs/demo.yaml

demo-quick: $(READY)  ## the same in three minutes: a twelfth of the data, fewer steps
	@$(BIN)/rayrlhf run configs/demo.yaml run.name=demo-quick world.size=0.08 ppo.steps=4 eval.best_of=4

test: $(READY)  ## the tests, real engines included
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)  ## the slow ones too: benchmarks, long runs with faults, more shapes of what is resumed
	@$(BIN)/python -m pytest

test-unit: $(READY)  ## the fast ones
	@$(BIN)/python -m pytest tests/unit

test-faults: $(READY)  ## every role, killed and hung in every phase (half an hour; goes on where it was ended)
	@$(BIN)/python -m tests.fault_matrix

soak: $(READY)  ## 200 steps with a fault every few, three seeds, beside the same runs in peace (an hour)
	@$(BIN)/python -m tests.soak

check: $(READY)  ## lint, types, import rules
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo

bench: $(READY)  ## the README's performance table, measured here (an hour; nothing else should run)
	@for name in ppo rollout learner sync control; do $(BIN)/rayrlhf bench $$name || exit 1; done

gpu-check:  ## what this machine's GPUs and packages allow, as a table (all skipped without a GPU)
	@test -x $(BIN)/python || $(MAKE) setup
	@$(BIN)/python benchmarks/gpu_check.py

format: $(READY)  ## format and mend what ruff can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lock: $(READY)  ## make requirements/cpu.lock anew from pyproject.toml
	@bash scripts/lock.sh --upgrade

clean:  ## remove caches and runs, not .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
