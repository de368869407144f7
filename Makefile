.PHONY: install demo test test-fast test-slow test-lm-eval architectures settings quality style clean

VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := fedbiot_trainer recipes benchmarks tests docs setup.py

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

# Two processes; the tests of a file stay together, with what its fixtures have launched.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: install
	$(PYTEST) -m "not slow"

test-fast: install
	$(PYTEST) -m "not slow and not trains"

test-slow: install
	$(BIN)/python -m pytest -m slow

# In an environment of its own: lm_eval brings some thirty packages.
test-lm-eval:
	test -x $(VENV)-lm-eval/bin/python || python3 -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)-lm-eval/bin/pip install --quiet --disable-pip-version-check -e ".[lm-eval]" pytest
	$(VENV)-lm-eval/bin/python -c "import lm_eval"  # without it the tests would be skipped
	$(VENV)-lm-eval/bin/python -m pytest tests/recipes/test_lm_eval.py

# docs/architectures.md
architectures: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/architectures.py

# docs/settings.md
settings: install
	$(BIN)/python docs/settings.py

quality: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

style: install
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) $(VENV)-lm-eval outputs build *.egg-info
