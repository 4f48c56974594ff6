# `make test` and `make demo` need only Python 3.11 or newer; everything else they set up themselves.
#
#   PYTHON=python3.12        another interpreter for the environment
#   TORCH=torch==2.13.0      the torch to install first
#   TORCH_INDEX=<url>        where to take it from, for example your CPU wheel index

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Arguments for pytest: make test PYTEST_ARGS="-k commit -x"
PYTEST_ARGS ?=
# Files of tests run side by side, one process a core; each loads torch, hence the limit.
PYTEST_PARALLEL ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: setup lint format type test soak demo constraints clean help

help:
	@echo "make setup   environment in $(VENV) with everything (done by the others when needed)"
	@echo "make test    lint, types and tests: what CI runs"
	@echo "make demo    real teacher -> store -> verify -> student trained from the store -> demo-out/"
	@echo "make soak    long repetitions of races and kills, minutes each"
	@echo "make lint | format | type | constraints | clean"

setup: $(READY)

# torch goes first and alone: another package would otherwise choose the build, possibly one of
# several GB for a GPU that is not there.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(READY)
	$(BIN)/mypy

# pytest comes last, so that its summary is the last line.
test: lint type
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) $(PYTEST_ARGS)

soak: $(READY)
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

demo: $(READY)
	$(BIN)/python demo/run.py

# After a change of dependencies: write down the exact versions that are now installed. A local
# version such as +cpu is left out, since other machines have other builds.
constraints:
	echo '# The exact versions of a fresh `make setup`. Rewrite with `make constraints`.' > constraints.new
	$(PIP) freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' >> constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) dist build demo-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
