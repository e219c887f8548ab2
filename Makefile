# make demo         transcribe the bundled samples, read a sentence aloud and a hand that shows a number
# make test         the tests, without the slow ones
# make check        lint, formatting, types, import order
# make check-slow   the slow tests
# make golden       what the program does, against the files it is frozen in
#
# PIP_ARGS goes to every pip install; it can name the index of PyTorch's small CPU build, for instance.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n logical --maxprocesses 4
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)

.PHONY: demo test check check-slow golden clean

demo: $(VENV)/.runtime
	$(BIN)/whisper-moe transcribe examples/sample.m4a examples/hindi.m4a
	$(BIN)/whisper-moe speak "Good morning. This is a small model, and it reads aloud." -o demo.m4a
	$(BIN)/whisper-moe sign examples/signs/hand.mov

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_import_order.py

check-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --timeout 1800 $(PARALLEL) --dist worksteal

golden: $(VENV)/.dev
	$(BIN)/python tests/golden/golden.py

$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (minutes the first time: torch is large)" >&2
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
