# `make test` and `make quickstart` are all a fresh machine needs: each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
# Two tests at a time, each on one thread; more, as JOBS=8, on a machine with more cores.
JOBS ?= 2
PYTEST := $(PY) -m pytest -n $(JOBS) --dist worksteal
CHECKED := core kernels benchmarks tools tests examples setup.py pretrain_gpt.py

# Threads that wait asleep: beside other work, spinning ones make a run ten times slower.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup test parity soak quickstart lint format clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | expand -t 14

setup: $(VENV)/.ready  ## make .venv: pinned requirements, then the package with its native module

# Two stamps: an edit of a source file rebuilds the native module without asking the package index.
$(VENV)/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Trivium needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	    "try: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing requirements.txt into $(VENV)"
	@$(PIP) install -qq --no-compile -r requirements.txt
	@touch $@

$(VENV)/.ready: $(VENV)/.requirements pyproject.toml setup.py $(CSRC)
	@echo "setup: building the package"
	@$(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@

# Peers are only compared with: without them the conformance tests skip.
$(VENV)/.peers: $(VENV)/.ready requirements-peers.txt
	@$(PIP) install -qq --no-deps -r requirements-peers.txt 2>/dev/null || \
	  echo "setup: requirements-peers.txt did not install; the conformance tests will skip"
	@touch $@

test: $(VENV)/.peers lint  ## lint, and every test that needs neither a GPU nor patience
	@$(PYTEST) -m "not soak and not gpu and not parity"

parity: $(VENV)/.ready  ## every layout against one process, and every mutation
	@$(PYTEST) -m "not soak and not gpu" tests/parity tests/interop/test_families.py \
	  tests/estimate/test_activations.py

soak: $(VENV)/.peers  ## the long proofs
	@$(PY) -m pytest -m soak

quickstart: $(VENV)/.ready  ## text to trained model in 5 minutes; INPUT=path for yours
	@$(PY) examples/quickstart.py $(if $(INPUT),--input "$(INPUT)")

lint: $(VENV)/.ready  ## ruff check, and mypy over core/
	@$(PY) -m ruff check -q $(wildcard $(CHECKED))
	@$(PY) -m mypy --no-error-summary

format: $(VENV)/.ready  ## ruff format, and ruff's safe fixes
	@$(PY) -m ruff check -q --fix $(wildcard $(CHECKED))
	@$(PY) -m ruff format -q $(wildcard $(CHECKED))

clean:  ## remove everything that was built, .venv too
	rm -rf $(VENV) build dist core/*.so core/*.egg-info *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
