# make             the whole notebook and its PDF, into build/; prints the table of answers
# make test        lint and all tests, a run of the whole notebook on tiny data included
# make fast-test   the tests that take no more than seconds each
# Every target but clean sets up .venv first, with the packages of requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LOWEST := .venv-lowest
OUT := build/assignment3.ipynb

.PHONY: all run pdf results test fast-test test-lowest lint format sync publish bench clean

.NOTPARALLEL:
all: run pdf results  # in this order

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

run: $(READY)
	$(BIN)/python tools/notebook.py run $(OUT)

pdf: $(READY)  # of the last run if there is one, else of the committed notebook
	notebook=$(OUT); test -f $$notebook || notebook=assignment3.ipynb; \
	$(BIN)/python -c "import utils; from pathlib import Path; utils.export_pdf(Path('$$notebook'), Path('build/assignment3.pdf'))"

results: $(READY)
	$(BIN)/python tools/notebook.py results $(OUT)

test: $(READY) lint
	$(BIN)/python -m pytest --durations=10

fast-test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

$(LOWEST)/.ready: requirements.txt $(READY)  # the lowest versions that requirements.txt allows
	$(BIN)/uv venv --quiet --clear --python 3.11 $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --requirement requirements.txt
	touch $@

test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest -m "not slow"
	$(LOWEST)/bin/python -m nbconvert --to utils.TypstPDFExporter --output-dir build/lowest assignment3.ipynb

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

bench: $(READY)  # minutes; make bench ARGS=--full trains the starter too, an hour and a half
	$(BIN)/python -m offline.training.bench $(ARGS)

clean:
	rm -rf build runs .venv $(LOWEST)
