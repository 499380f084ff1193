# One word per habit; `make help` lists them. Everything happens in .venv and storage/.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m

.PHONY: help install quickstart up down test test-slow test-long test-quick test-page test-kserve chaos lint types format lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

install: $(BIN)/.installed  ## make .venv with the pinned packages

$(BIN)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

quickstart: install  ## the whole road on handwritten digits: preprocess, train, track, register, serve, predict
	@$(RUN) jobs.quickstart jobs/configs/quickstart/digits.yaml

up: install  ## the same, and leave MLflow, Ray and the endpoint running
	@$(RUN) jobs.quickstart jobs/configs/quickstart/digits.yaml keep=true

down: install  ## stop what `make up` left running
	@$(RUN) jobs.down

test: install  ## style, types, architecture, all tests but the slow ones, the quickstart in them; CI runs this
	$(MAKE) --no-print-directory lint types
	$(BIN)/pytest -m "not slow and not long"

test-slow: install  ## kills, full disks, stopped jobs, real scales; before a release
	$(BIN)/pytest -m "slow and not long"

test-long: install  ## a whole sweep, the README's commands on a folder of photos, detectors killed and resumed; minutes each
	$(BIN)/pytest -m long

test-quick: install  ## the tests that need no Ray and no server
	$(BIN)/pytest tests/unit tests/contract tests/house

chaos: install  ## kills at random moments on 50,000 files; long
	$(BIN)/pytest tests/chaos

test-page: install  ## the page for people in a real Chromium, which the system has to bring
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement pyproject.toml --extra page
	$(BIN)/pytest tests/page

test-kserve: install  ## KServe's own client against the endpoint, out of a venv of its own: it asks for other versions
	test -x .venv-kserve/bin/python || $(PYTHON) -m venv .venv-kserve
	$(BIN)/uv pip install --quiet --python .venv-kserve/bin/python kserve
	VENTRAL_KSERVE_PYTHON=$(CURDIR)/.venv-kserve/bin/python $(BIN)/pytest tests/serving/test_kserve_client.py

lint: install  ## style, spelling, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports

types: install  ## mypy --strict
	$(BIN)/mypy

format: install  ## write the style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## pin what is installed now
	$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable > requirements.lock

clean:  ## remove everything that is made: venvs, storage, caches
	rm -rf .venv .venv-kserve storage build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
