# All set-up happens here: `make demo` and `make test` work on a machine that has Python and pip only.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench check lint types wheel clean

demo: $(STAMP)          ## train on the embedded stories, score, and write (about ten minutes on two cores)
	$(BIN)/calm demo --overwrite

test: $(STAMP)          ## all tests
	$(BIN)/python -m pytest -n auto

bench: $(STAMP)         ## time ours against literal references, in turns (about a quarter of an hour, most of it compiling)
	for question in energy.py "training_step.py --compile" options.py "generation.py --compile" tokenizing.py; do \
		$(BIN)/python benchmarks/$$question || exit 1; done

check: lint types       ## lint, types, and the direction of imports
	$(BIN)/python -m pytest -q tests/test_architecture.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# torch comes first and alone: a CPU build that is at hand stays, and no GPU build is pulled in later.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist src/*.egg-info
