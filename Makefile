# Every recipe is the plain command that a user can type in a shell with .venv active; make prints it and runs it.
# Needs GNU make and Python 3.11 or 3.12. ARGS goes to the command: make pretrain ARGS="optim.num_steps=50"

SHELL := bash
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	$$name -c "" 2>/dev/null && { echo $$name; exit; }; done; echo python3)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv lint test test-more soak pretrain study bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "Each prints the plain command it runs; to type such commands yourself: source .venv/bin/activate"

venv: .venv/.stamp  ## build .venv, or update it when pyproject.toml changed

lint: .venv/.stamp  ## style, types and import layers
	ruff check
	ruff format --check
	mypy
	lint-imports

test test-more soak: export OMP_NUM_THREADS := 1

test: .venv/.stamp  ## the fast tests
	python -m pytest -m "not more and not slow and not gpu" $(ARGS)

test-more: .venv/.stamp-bench  ## the longer tests of CI; brings the peers of the benchmarks, and lm-eval
	python -m pytest -m "more and not slow and not gpu" --durations=40 $(ARGS)

soak: .venv/.stamp  ## effective training time under 20 kills (an hour), then more kills than CI has time for
	python tools/bench/goodput.py
	python -m pytest -m "slow and not gpu" tests/faults $(ARGS)

pretrain: .venv/.stamp  ## train the quickstart experiment in runs/
	python -m sleeptrain.pretrain experiment=quickstart $(ARGS)

study: .venv/.stamp  ## accuracy over N at equal tokens, FLOPs and time, with its report; under 20 minutes on 2 cores
	python -m sleeptrain.study study=rule110_n study.scale=cpu_minutes $(ARGS)

bench: .venv/.stamp-bench  ## measure against the peers on a CPU, one figure per file of tools/bench
	@for file in $(filter-out %/measure.py %/goodput.py %/gdn_gpu.py %/train_gpu.py, $(wildcard tools/bench/*.py)); do echo "python $$file"; python $$file || exit; done

# A stamp is written only after pip succeeded, so a failed install is tried again; it counts for nothing where the
# Python below .venv no longer runs.
ifneq ($(shell .venv/bin/python -c "" 2>/dev/null && echo runs),runs)
.venv/.stamp: always
.PHONY: always
endif

.venv/.stamp: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])" 2>/dev/null || { \
	  echo "sleeptrain needs Python 3.11 or 3.12, and '$(PYTHON)' is neither; name one: make venv PYTHON=python3.11"; \
	  exit 1; }
	@echo "Installing sleeptrain and its tools in .venv (the first time takes a minute or more)"
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	python -m pip install -qq --editable ".[dev]"
	@touch $@
	@echo "Done; to use it in your own shell: source .venv/bin/activate"

.venv/.stamp-bench: .venv/.stamp
	python -m pip install -qq --editable ".[bench,lm-eval]"
	@touch $@
