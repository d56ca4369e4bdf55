# make        the whole notebook, its PDF and the results table, in build/
# make test   all tests, the notebook's smoke run included
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest

.PHONY: all run pdf results test test-oldest fast-test lint format sync publish readme bench clean

all: run pdf results

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

run: $(READY)
	mkdir -p build
	$(BIN)/python tools/notebook.py run build/assignment3.ipynb

pdf: $(READY)
	$(BIN)/python -c "import utils; from pathlib import Path; \
	  utils.export_pdf(Path('$(or $(wildcard build/assignment3.ipynb),assignment3.ipynb)'), Path('build/assignment3.pdf'))"

results: $(READY)
	$(BIN)/python tools/notebook.py results

ALL_TESTS = A3_PROFILE=tiny A3_RUNS=build/smoke $(BIN)/python -m pytest --nbmake \
  --nbmake-timeout=600 --durations=10 assignment3.ipynb tests

test: $(READY) lint
	rm -rf build/smoke
	$(ALL_TESTS)

test-oldest:  # every test again, on the oldest versions that requirements.txt admits
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python \
	  --resolution lowest-direct --requirement requirements.txt
	rm -rf build/smoke
	$(subst $(BIN),$(OLDEST)/bin,$(ALL_TESTS))

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
	$(BIN)/python tools/notebook.py publish build/assignment3.ipynb
	$(BIN)/python tools/notebook.py readme

readme: $(READY)
	$(BIN)/python tools/notebook.py readme

bench: $(READY)
	$(BIN)/python tests/bench.py

clean:
	rm -rf build runs $(VENV) $(OLDEST)
