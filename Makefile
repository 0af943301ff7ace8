# `make help` lists the commands. Variables: PYTHON=python3.12, PIP_ARGS="--extra-index-url ...", ARGS="seed=1 k=8".

PYTHON ?= python3# the interpreter that makes the virtual environment, 3.11 or newer
VENV ?= .venv
PIP_ARGS ?=# for pip, such as an index with CPU builds of PyTorch
ARGS ?= selector=mass k=4# overrides for `make run`
SIZE ?= mini# of a sweep: mini (tiny models, CPU), small (small pretrained models, CPU) or paper (pretrained models, GPUs)
JOBS ?= 2# of a sweep, at a time
DATA ?=# of a sweep: the folder with public data; none: they are fetched
DEMO ?= outputs/demo# where `make demo` puts its tables and figures
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Two test processes on two cores: one thread each, or they wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help setup run demo pretrained gpu tables bench test test-long docs wheel lint types clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.runtime ## install Python packages at their pinned versions, into .venv

run: setup ## MASS-DPO on the embedded default: a tiny model, about a minute
	$(BIN)/python run.py $(ARGS)

demo: setup ## mass, random, hardest and the full pool, 3 seeds each: tables and figures
	$(BIN)/python run.py -m sweeps=demo hydra/launcher=joblib hydra.launcher.n_jobs=2 trainer.threads=1 logger=none
	$(BIN)/python -m massdpo.report demo --out $(DEMO)

pretrained: $(VENV)/.pretrained ## MASS-DPO on real weights: SmolLM2 (135 M parameters) out of a Python package, no hub
	$(BIN)/python run.py setting=pretrained logger=none

sweep-%: setup ## a sweep and its report: make sweep-main DATA=folder SIZE=mini JOBS=2
	OMP_NUM_THREADS=1 $(BIN)/python run.py -m sweeps=$* size=$(SIZE) $(if $(DATA),data_dir=$(DATA)) logger=none \
		hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)
	$(BIN)/python -m massdpo.report $*

gpu: ## one GPU, 12 minutes, no network: check and measure the engine, then the small sweep (sweeps/gpu.sh has the options)
	sweeps/gpu.sh

tables: setup ## tables, figures and the page of results/, from its rows and the runs that are here
	$(BIN)/python -m massdpo.report --out results

bench: $(VENV)/.test ## measure the engine and the selectors on this machine
	$(BIN)/python -m massdpo.benchmark engine
	$(BIN)/python -m massdpo.benchmark selection

test: $(VENV)/.test ## the fast tests
	$(PYTEST) -m "not slow"

test-long: $(VENV)/.test ## the slow tests
	$(PYTEST) -m slow --dist worksteal --durations 20

docs: $(VENV)/.docs ## the pages of docs/ as a site, build/docs/index.html
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean --strict

wheel: setup ## the package with its command, conf/ and sweeps/, as dist/*.whl
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy
	$(BIN)/mypy

clean: ## remove what make and the tools have made; results/ and outputs/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist massdpo.egg-info
	find massdpo tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is newer than the files that it was installed from.
$(VENV)/.runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "massdpo needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "installing into $(VENV): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_ARGS) -r requirements.lock
	$(PIP) --no-deps --editable .
	@touch $@

$(VENV)/.pretrained: $(VENV)/.runtime requirements-pretrained.lock
	$(PIP) $(PIP_ARGS) --no-deps -r requirements-pretrained.lock
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime requirements-docs.lock
	$(PIP) $(PIP_ARGS) -r requirements-docs.lock
	@touch $@

$(VENV)/.test: $(VENV)/.runtime requirements-test.lock
	$(PIP) $(PIP_ARGS) -r requirements-test.lock
	@touch $@
