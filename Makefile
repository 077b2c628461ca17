# `make` lists what can be made. Everything is installed into .venv, nothing outside this folder.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install, meta-train a small ANML on generated characters, draw its curve"
	@echo "make install      install what the two scripts need into .venv"
	@echo "make test         install the tools as well, then lint and all tests"
	@echo "make lint         lint, format and types only"
	@echo "make clean        remove .venv and caches; runs, data and models stay"
	@echo "PYTHON=python3.12 make ...   another Python, 3.10 or newer, for .venv"

# A stamp in .venv for each list: newer than its list, all of it is installed.
install: $(VENV)/.installed

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(RUN)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.installed

quickstart: install
	$(RUN) mrcl_classification.py --config configs/quickstart.toml
	$(RUN) evaluate_classification.py --config configs/quickstart_evaluate.toml
	@echo
	@echo "Done. What there is now:"
	@echo "  model            runs/quickstart.net"
	@echo "  training run     $$(ls -td runs/quickstart_[0-9]* | head -n 1)"
	@echo "  evaluation run   $$(ls -td runs/quickstart_evaluate_[0-9]* | head -n 1)"
	@echo "  accuracy curve   $$(ls -t runs/quickstart_evaluate_[0-9]*/accuracy.png | head -n 1)"
	@echo "What to type next:"
	@echo "  $(VENV)/bin/tensorboard --logdir runs        # curves of both, in a browser"
	@echo "  $(RUN) mrcl_classification.py --help    # every flag"
	@echo "  $(RUN) mrcl_classification.py --config configs/anml.toml    # the paper's ANML, on Omniglot"

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy .

# One thread a worker: two workers that each take all cores are slower than one.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
