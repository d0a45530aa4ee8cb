# make demo   install into .venv, simulate a small stack, align and classify it
# make test   install into .venv, run the test suite and the linters
# make sabotage  turn features off one by one: does the test that watches each one fail?
# make bench  install into .venv, list what can be measured
# An environment of your own: make test VENV=/path/to/it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test long-test sabotage lint bench clean

# The stamp is newer than what it was installed from, or pip runs again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	rm -rf demo
	$(BIN)/cryoalign simulate demo/data n=400 n_classes=4 size=64 snr=0.1 seed=1
	$(BIN)/cryoalign run demo/data/particles.star n_classes=4 \
	  output=demo/run seed=3
	@echo "Open demo/run/report.html; the pictures lie beside it."

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/installed
	$(BIN)/pytest -m "not long"
	$(MAKE) lint

long-test: $(VENV)/installed
	$(BIN)/pytest -m long

sabotage: $(VENV)/installed
	$(BIN)/python tests/sabotage.py

bench: $(VENV)/installed
	$(BIN)/python -m bench --help

clean:
	rm -rf demo runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
