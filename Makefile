.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
TIERS := test-unit test-reports test-distributed test-integration test-gpu

# The quickstart needs the base dependencies only; the dev install has them too. CI takes no file whose hash is not in
# the lock, but torch and what only its CUDA builds need: which build a machine has is for its own index to say.
LOCK := constraints-hashes.txt
.venv/.base .venv/.installed: pyproject.toml constraints.txt $(LOCK)
	$(PYTHON) -m venv .venv
	$(if $(CI),$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement $(LOCK))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(EXTRAS)'
	touch .venv/.base $@

.venv/.installed: EXTRAS := [dev]

# the oldest release of each package that pyproject.toml admits, and what these need at its newest
.venv-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/' > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --no-compile --constraint .venv-lowest/constraints.txt --editable '.[dev]'
	touch $@

.PHONY: install quickstart test $(TIERS) test-lowest test-full soak lint lock audit help

install: .venv/.installed  ## Make .venv with everything in it

quickstart: .venv/.base  ## The whole system on real digits, about six minutes on two cores
	$(BIN)/ig-dist quickstart

test: .venv/.installed  ## All tests but the long forms, tier by tier (one of them: make test-unit)
	$(BIN)/python -m tests.tally

$(TIERS): test-%: .venv/.installed
	$(BIN)/pytest tests/$*

test-lowest: .venv-lowest/.installed  ## With the oldest packages that pyproject.toml admits: unit tests, benchmarks
	.venv-lowest/bin/python -m pytest tests/unit tests/reports

test-full: .venv/.installed  ## All tests, long forms too
	$(BIN)/python -m pytest tests -m 'full or not full' --import-mode=importlib

soak: .venv/.installed  ## Faults at seeded moments, for ten minutes; python tests/soak.py --help says more
	$(BIN)/python tests/soak.py

lint: .venv/.installed  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: SHELL := /bin/bash -o pipefail
lock:  ## constraints-hashes.txt anew, from constraints.txt; needs uv (pip install uv) and an index of packages
	uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 --python-platform linux \
		--constraint constraints.txt --all-extras pyproject.toml \
		| awk '/^[^ ]/ {other = /^(torch=|triton|cuda-|nvidia-)/} !other' > $(LOCK).new
	mv $(LOCK).new $(LOCK)

audit:  ## Known holes in what CI installs; needs pip-audit (pip install pip-audit) and the network: it asks PyPI
	pip-audit --requirement $(LOCK) --require-hashes --disable-pip --strict

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16
