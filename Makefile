# make demo | test | test-programs | test-multihost | test-slurm | test-kubernetes | test-ray | goldens | check | docs | bench | bench-report | bench-check | bench-peers; `make help` lists all. Everything runs in .venv, which is made on first use.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PLOTTING := .venv/.plotting
DOCS := .venv/.docs
RAY := .venv-ray
SCHEMAS := .venv/.schemas
PYTEST := $(BIN)/pytest --doctest-modules --ignore=src/paramserver/integrations/ray --numprocesses auto --maxprocesses 4 --dist worksteal
WHICH := import sys; print(sys.base_prefix, sys.version)
PIP := $(BIN)/python -m pip --require-virtualenv --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-programs test-multihost test-slurm test-kubernetes test-ray goldens lint types check docs bench bench-report bench-check bench-peers clean

help: ## show this
	@sed -n 's/^\([a-z.-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

# Without a PYTHON that is given, .venv stays as it is; that of another interpreter is made anew.
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) -c '$(WHICH)' 2>/dev/null),$(shell $(BIN)/python -c '$(WHICH)' 2>/dev/null))
.PHONY: $(INSTALLED)
CLEAR := --clear
endif
endif

.venv: $(INSTALLED) ## the virtual environment with what is pinned, and the package

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into .venv, which takes a minute or two"
	@$(PYTHON) -m venv $(CLEAR) .venv
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED) ## train on bundled data with five processes
	@$(BIN)/paramserver demo

test: $(INSTALLED) ## all tests but whole programs, the examples of the docstrings included
	@$(PYTEST) -m "not whole_program and not multihost and not slurm and not kubernetes and not ray" tests src

test-programs: $(INSTALLED) ## the examples, the demo, the benchmarks in short, and runs whose tasks are all killed
	@$(PYTEST) -m whole_program tests

test-multihost: $(INSTALLED) ## runs on several hosts, which are made of network namespaces; skipped without root
	@$(BIN)/pytest -m multihost tests/multihost

test-kubernetes: $(SCHEMAS) ## manifests for Kubernetes against the published schemas of what they describe
	@$(BIN)/pytest -m kubernetes tests/kubernetes

goldens: $(INSTALLED) ## write the manifests anew that the tests compare with; look at the difference before a commit
	@$(BIN)/python -m tests.unit.launch.goldens.renew

test-slurm: $(INSTALLED) ## runs on a Slurm of three nodes on this machine; installs Debian's packages of it, as root
	@command -v slurmctld slurmd munged ip >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge iproute2; } || \
	  { echo "error: expected Debian's packages slurm-wlm, munge and iproute2, and could not install them; install them as root" >&2; exit 1; }
	@$(BIN)/pytest -m slurm tests/slurm

test-ray: $(RAY)/.installed ## runs on a cluster of Ray with three nodes on this machine, in an environment of its own
	@$(RAY)/bin/pytest -m ray tests/ray

$(RAY)/.installed: requirements.lock requirements-ray.lock pyproject.toml
	@echo "installing into $(RAY), which takes a minute or two"
	@$(PYTHON) -m venv --clear $(RAY)
	@$(RAY)/bin/python -m pip --require-virtualenv --disable-pip-version-check -qq install -r requirements.lock -r requirements-ray.lock
	@$(RAY)/bin/python -m pip --require-virtualenv --disable-pip-version-check -qq install --no-deps --no-build-isolation -e .
	@touch $@

lint: $(INSTALLED) ## ruff and codespell
	@$(BIN)/ruff check .
	@$(BIN)/codespell src tests benchmarks examples docs *.md

types: $(INSTALLED) ## mypy
	@$(BIN)/mypy

check: lint types test test-programs test-multihost test-kubernetes ## what CI runs, with docs

docs: $(DOCS) ## the pages of docs/ and a reference of all public names, in site/; a warning or a dead link fails it
	@rm -rf site
	@$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going --conf-dir docs --doctree-dir build/docs . site
	@echo "site/index.html"

bench: $(INSTALLED) ## speed and memory beside plain PyTorch, with the promises about them
	@$(BIN)/python -m benchmarks promises
	@for case in network neighbour prepare; do $(BIN)/python -m benchmarks $$case; done

bench-report: $(PLOTTING) ## docs/performance.md from benchmarks/results.jsonl
	@$(BIN)/python -m benchmarks report benchmarks/results.jsonl

bench-check: $(INSTALLED) ## measure again, and fail where a ratio is worse than the committed one
	@$(BIN)/python -m benchmarks check

bench-peers: $(INSTALLED) ## other ways to train, each in a virtual environment of its own, beside this one
	@$(BIN)/python -m benchmarks peers

$(PLOTTING): $(INSTALLED) requirements-bench.lock
	@$(PIP) install -r requirements-bench.lock
	@touch $@

$(DOCS): $(INSTALLED) requirements-docs.lock
	@$(PIP) install -r requirements-docs.lock
	@touch $@

$(SCHEMAS): $(INSTALLED) requirements-kubernetes.lock
	@$(PIP) install -r requirements-kubernetes.lock
	@touch $@

clean: ## remove .venv and all caches
	@rm -rf .venv .venv-peers .venv-ray .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site src/*.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
