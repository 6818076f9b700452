# Everything a checkout needs. The first target that is asked for creates .venv and installs into it;
# this happens once, and again when pyproject.toml or constraints.txt change.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.installed
CHECKED := src tests benchmarks examples

# Without the theme's notice about another site generator.
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict && $(BIN)/python .ci/docs_offline.py site

# One thread for each of the two test processes: more would only get in each other's way.
test test-slow test-oldest: export OMP_NUM_THREADS := 1

.PHONY: demo test test-slow test-all lint check docs bench test-oldest clean

demo: $(READY)
	$(BIN)/spem demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-all: test test-slow

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/basedpyright
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python .ci/check_wheel.py dist
	$(SITE)

docs: $(READY)
	$(BIN)/python .ci/docs_tables.py
	$(SITE)

check: test-all lint

bench: $(READY)
	$(BIN)/python benchmarks/speed.py

test-oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal tests/attention

clean:
	rm -rf $(VENV) $(OLDEST) dist build site .pytest_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	$(call environment,$(OLDEST))
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[timm]" \
		hypothesis pytest pytest-randomly pytest-timeout pytest-xdist
	touch $@

# An environment that a former run left unfinished has no working pip and is created again.
define environment
@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
endef
