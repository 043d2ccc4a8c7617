# Everything runs in .venv, made from requirements.lock by the first target that needs it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .bench-peers

.PHONY: demo test check app bench slow docs clean

demo: $(READY)  ## circuits of a real pretrained model, in the terminal
	$(BIN)/wb demo

test: $(READY)  ## the fast tests
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu and not network"

slow: $(READY)  ## the slow tests, minutes
	$(BIN)/pytest -m slow --ignore tests/benchmarks

check: $(READY)  ## formatting, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_architecture.py

docs: $(READY)  ## pages and reference in site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

app: $(READY)  ## the browser app, on this machine only
	$(BIN)/wb app

bench: $(READY) $(PEERS)/.ready  ## speed against peers and limits, as ratios
	BENCH_PEERS=$(PEERS) $(BIN)/pytest tests/benchmarks -m slow -s -o addopts=  # without the type checks of the tests

$(PEERS)/.ready: tests/benchmarks/requirements.txt $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-input --no-deps --upgrade --target $(PEERS) -r $<
	touch $@

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-input -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation -e .
	touch $(READY)

clean:  ## the environment; models and results in WORKBENCH_HOME stay
	rm -rf $(VENV) $(PEERS)
