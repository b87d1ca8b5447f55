# One virtual environment, two commands. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
FUZZ_SECONDS ?= 60
SOAK ?= tests
# pip's own progress bar on a terminal, a line per package elsewhere.
PROGRESS := $(shell [ -t 1 ] && echo on || echo off)

.PHONY: demo test integration compiled soak mutants docs docs-serve notebooks docs-check dist fuzz chaos \
	audit lint types bench gpu clean

# torch and torchvision are resolved together (one command), since only releases of the same day fit.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	@echo "Installing torch and what else is needed: some gigabytes with CUDA, minutes."
	$(BIN)/python -m pip install --progress-bar $(PROGRESS) --editable '.[test]'
	touch $(STAMP)

# One thread: the network is too small to share, and idle threads spin.
demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/n2uq fit --config configs/digits/n2uq_w2a2.yaml --test_after_fit true

# Bytecode is kept even where the environment says otherwise: every worker imports all tests.
test integration compiled soak docs-check: export PYTHONDONTWRITEBYTECODE :=

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Whole runs of commands, ranks, browsers, compilers and exporters: seconds to a minute each.
integration: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "integration and not slow and not compiled"

# The Triton kernels without a GPU: interpreted, or compiled for one and emulated.
compiled: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m compiled

soak: $(STAMP)
	$(BIN)/pytest -m slow $(SOAK)

# A sample of small errors put into the code: do the tests notice? Results go to benchmarks/results/mutants.json.
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants

# The documentation as a site in build/site, with warnings as errors and links checked.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same at http://127.0.0.1:8000, built again whenever a page changes.
docs-serve: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The tutorials as notebooks with their output, executed now (examples/notebooks).
notebooks: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs,export]'
	$(BIN)/python docs/_site/notebooks.py

# README and docs: links, paths, flags, snippets, and the commands that take less than a minute.
docs-check: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "" tests/docs

# Coverage-guided, every reader of files for FUZZ_SECONDS.
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_readers.py --seconds $(FUZZ_SECONDS)

# Random faults on small runs whose result is known; goes on until it is told to stop (Ctrl-C).
chaos: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/campaign.py

# What is installed here, against the list of known vulnerabilities; from an environment of its own.
audit: $(STAMP)
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python tests/audit.py $(VENV)-audit/bin/pip-audit

lint: $(STAMP)
	$(BIN)/python -m pip install --quiet '.[dev]'
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# mypy does not follow the package-dir mapping of an editable install: check a plain one.
types: $(STAMP)
	$(PYTHON) -m venv $(VENV)-types
	$(VENV)-types/bin/python -m pip install --quiet '.[dev,figures,dashboards,export]'
	cd $(VENV)-types && bin/mypy --config-file ../pyproject.toml -p lightning_n2uq

# Wheel and source distribution in dist/, checked.
dist: $(STAMP)
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# On a machine with a CUDA device: what the tests skip elsewhere, then the figures.
gpu: $(STAMP)
	$(BIN)/n2uq doctor --check
	$(BIN)/pytest tests/ops -k "gpu or cuda"
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf build dist *.egg-info $(VENV)-types $(VENV)-audit .pytest_cache .ruff_cache .mypy_cache
