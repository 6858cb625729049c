# Two commands matter: `make demo` and `make test`. Both make .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := torch==2.13.0
# Further pip arguments for torch alone: a CPU-only index, or a GPU one.
TORCH_ARGS ?=
TESTS ?= tests
# What `make bench` measures (empty: everything), further arguments for it, and the peer's own environment.
WORKLOADS ?=
BENCH_ARGS ?=
PEER := .venv-peer

.PHONY: help demo demo-quick test lint bench install install-dev clean

help:  ## This list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: $(VENV)/.installed-demo  ## The whole pipeline on the embedded default; leaves runs/demo/report.html.
	$(BIN)/temper run configs/finops.yaml
	@echo "the report: runs/demo/report.html"

demo-quick: $(VENV)/.installed-demo  ## The same path at the smallest setting that still trains each phase.
	$(BIN)/temper run configs/finops-quick.yaml
	@echo "the report: runs/demo-quick/report.html"

test: $(VENV)/.installed-dev  ## Every test. One room: make test TESTS=tests/gate
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.installed-dev  ## ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/mypy temper

bench: $(VENV)/.installed-dev $(PEER)/.installed  ## Training speed against TRL; some of it: make bench WORKLOADS=sft_full,dpo
	$(BIN)/python benchmarks/training/run.py --peer $(PEER)/bin/python --workloads "$(WORKLOADS)" $(BENCH_ARGS)

install: $(VENV)/.installed-demo  ## What the demo needs.
install-dev: $(VENV)/.installed-dev  ## What tests and lint need.

clean:  ## Forget the virtual environments and the tools' caches; runs/ stays.
	rm -rf $(VENV) $(PEER) .pytest_cache .mypy_cache .ruff_cache build *.egg-info

# Every later step reuses this Python, so its version is looked at before anything is made with it.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no '$(PYTHON)' here"; echo "  do:  install Python 3.11 or newer, or name one: make demo PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: temper needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)"; echo "  do:  name a newer one: make demo PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments"; echo "  do:  install its venv module (on Debian: apt-get install python3-venv)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that the build that was asked for is the one that the rest finds.
$(VENV)/.installed-demo: constraints.txt pyproject.toml | $(BIN)/python
	@echo "installing $(TORCH), then the rest of constraints.txt, into $(VENV): once, a few minutes"
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(PIP) -e ".[dev,demo]"
	@touch $@

# TRL wants versions of its own, so it never shares an environment with temper.
$(PEER)/.installed: benchmarks/peer-constraints.txt | $(BIN)/python
	@echo "installing TRL and what it needs into $(PEER): once, a few minutes"
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) "$(TORCH)"
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/peer-constraints.txt trl peft
	@touch $@
