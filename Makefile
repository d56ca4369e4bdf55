# make        the whole notebook, its PDF and the results table, in build/
# make test   all tests, the notebook's smoke run included
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT := build/assignment3.ipynb

.PHONY: all run pdf results test fast-test lint format sync publish bench clean

all: run pdf results

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

run: $(READY)
	$(BIN)/python tools/notebook.py run $(OUT)

pdf: $(READY)  # of the last run, or of the committed notebook
	mkdir -p build
	test -f $(OUT) || cp assignment3.ipynb $(OUT)
	$(BIN)/python -c "import utils; from pathlib import Path; \
	  utils.export_pdf(Path('$(OUT)'), Path('build/assignment3.pdf'))"

results: $(READY)
	$(BIN)/python tools/notebook.py results $(OUT)

test: $(READY) lint
	rm -rf build/smoke
	A3_PROFILE=tiny A3_RUNS=build/smoke $(BIN)/python -m pytest --nbmake --nbmake-kernel=python3 \
	  --nbmake-timeout=600 --durations=10 assignment3.ipynb tests

fast-test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sync: $(READY)  # after a change of utils.py
	$(BIN)/python tools/notebook.py sync

publish: $(READY)  # make the last run the committed one
	$(BIN)/python tools/notebook.py publish $(OUT)

bench: $(READY)  # minutes; make bench FULL=--full takes longer
	$(BIN)/python tests/bench.py $(FULL)

clean:
	rm -rf build runs $(VENV)
