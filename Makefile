.PHONY: install demo test test-slow quality style clean

VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := fedbiot_trainer recipes benchmarks tests setup.py

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

$(VENV)/.runtime: setup.py constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e . tensorboard
	touch $@

$(VENV)/.installed: $(VENV)/.runtime
	$(PIP) -e ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.runtime
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/fedbiot_sft.py

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) outputs build *.egg-info
