# All set-up happens here: `make demo` and `make test` work on a machine that has Python and pip only.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What torch brings itself, for a processor or for a GPU, is not in the lock.
OF_TORCH := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

.PHONY: install demo test test_all docs site notebooks fuzz soak bench gpu wheels check lint types lock clean

install: $(STAMP)       ## set up .venv

demo: $(STAMP)          ## train on the embedded stories, score, and write (about ten minutes on two cores)
	$(BIN)/calm demo --overwrite

# File by file: what a file's fixtures make, such as a trained model, is made once. In their own order: by the number of
# tests, the few long ones would come last, and one core would wait for the other.
test: $(STAMP)          ## the tests, but for variants that take long (tests/slow.txt)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test_all: $(STAMP)      ## all tests, before a release (half an hour on two cores)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# A broken link, a heading or a name that is not there, and an example that does not run are errors.
docs: $(STAMP)          ## run what the pages show, and build the site in build/site (the notebooks run in make test)
	$(BIN)/python -m pytest -n auto tests/docs --deselect tests/docs/test_notebooks.py
	$(MAKE) site

site: $(STAMP)          ## build the site alone; make test has run what it shows
	$(BIN)/jupyter-nbconvert --log-level WARN --to markdown --output-dir docs/notebooks examples/notebooks/*.ipynb
	$(BIN)/zensical build --clean --strict

notebooks: $(STAMP)     ## run the notebooks and keep what they print (about a minute)
	$(BIN)/jupyter-execute --inplace --NotebookClient.record_timing=False examples/notebooks/*.ipynb

# Cases that fail are kept in .hypothesis, and are tried first the next time.
fuzz: $(STAMP)          ## search for input that breaks something, for about an hour on two cores
	CALM_FUZZ_EXAMPLES=$(or $(EXAMPLES),1500) $(BIN)/python -m pytest -n auto --timeout 7200 tests/fuzz

soak: $(STAMP)          ## serve a crowd that behaves badly for half an hour
	$(BIN)/python benchmarks/soak.py

bench: $(STAMP)         ## time ours against literal references, in turns (about 20 minutes, most of it compiling)
	for question in energy.py "training_step.py --compile" flop_rate.py float32.py options.py "generation.py --compile" \
		"serving.py stories" tokenizing.py; do \
		$(BIN)/python benchmarks/$$question || exit 1; done

gpu: $(STAMP)           ## whether one GPU says what the CPU says, and how fast it is (eight minutes)
	$(BIN)/python benchmarks/gpu.py

wheels: $(STAMP)        ## install the wheel with each extra in empty environments, and use it (about ten minutes)
	$(BIN)/python benchmarks/wheels.py

check: lint types       ## lint, types, and the direction of imports
	$(BIN)/python -m pytest -q tests/test_architecture.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# torch comes first and alone: a CPU build that is at hand stays, and no GPU build is pulled in later.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

lock:                   ## write requirements.lock anew after constraints.txt has changed (needs uv)
	uv pip compile pyproject.toml --extra dev --constraints constraints.txt --generate-hashes --universal \
		--python-version 3.11 --no-annotate --no-header --quiet $(addprefix --no-emit-package ,$(OF_TORCH)) \
		--output-file requirements.lock

clean:
	rm -rf $(VENV) build dist src/*.egg-info
