# Every target does its own set-up: on a fresh clone `make demo` or `make test` is all there is to do.
# The environment is made once from requirements.lock; its stamp names the lock, so a second run starts at once.

PYTHON ?= python3.11
VENV ?= .venv
RUN := $(VENV)/bin/python
# two files of tests at a time, each in one process with one thread, in order: whole runs first, moments last
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.stamp-$(shell cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
# KV goes from prefill to decode engines over a library that loads these, over TCP too
RDMA := libibverbs1 librdmacm1
# the browser that looks at a report; these names are also in benchmarks/browser.py
BROWSER := command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable
LOAD_RDMA := import ctypes; [ctypes.CDLL(name) for name in ("libibverbs.so.1", "librdmacm.so.1")]

.PHONY: help setup demo docs test test-all check format clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the environment (the other targets do it themselves)

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; name another: make PYTHON=python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11" >&2; exit 1; }
	@echo "make: installing requirements.lock into $(VENV); once, a few minutes"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.stamp-*
	@touch $@

demo: setup ## Train the demo from scratch on the CPU
	$(VENV)/bin/sluice train recipes/demo.py --overwrite

docs: setup ## Write the reference pages from the code
	$(RUN) docs/generate.py

test: setup ## Run the tests that take seconds
	$(PYTEST) -m "not slow"

test-all: setup ## Run every test; installs SGLang (CPU) for the engine tests
	@$(RUN) -c '$(LOAD_RDMA)' 2>/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq $(RDMA); } || \
		{ echo "make: first install the system libraries of the prefill/decode tests: $(RDMA)" >&2; exit 1; }
	@{ $(BROWSER); } >/dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium; } || \
		{ echo "make: first install Chromium, for the tests of the report: apt-get install chromium" >&2; exit 1; }
	PYTHON=$(PYTHON) $(VENV)/bin/sluice engines install sglang --cpu
	$(PYTEST)

check: setup ## Formatting, lint, types, import layers
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright
	$(RUN) -m pytest -q tests/unit/test_layers.py

format: setup ## Format the code and apply safe fixes
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## Remove the environment, build output and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find src tests recipes examples -name __pycache__ -type d -prune -exec rm -rf {} +
