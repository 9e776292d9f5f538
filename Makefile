# One environment inside the checkout; every target makes it if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what the command needs, and what its tests need besides
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

.PHONY: demo test test-slow check bench clean

demo: $(INSTALLED)  ## train a small LLaMA with GaLore on real text, about two minutes on two cores
	$(BIN)/lowrank pretrain --method galore

test: $(TESTABLE)  ## every test but the long ones
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(TESTABLE)  ## the long ones too
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu"

check: $(TESTABLE)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(TESTABLE)  ## ratios against a peer, measured in alternation within one run
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/run.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(TESTABLE): $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
