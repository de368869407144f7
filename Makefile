.PHONY: install demo test test-fast test-slow test-oldest test-newest test-lm-eval test-deployment test-deployment-thorough test-namespaces architectures settings quality style clean

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := fedbiot_trainer recipes benchmarks tests docs setup.py

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages. Compiling all modules of the libraries takes
# two fifths of the installation's CPU time; Python compiles those that are imported.
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

$(VENV)/.runtime: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e . tensorboard
	touch $@

$(VENV)/.installed: $(VENV)/.runtime
	$(PIP) -e ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.runtime
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/fedbiot_sft.py

# Two processes. The tests of a file stay together, with what its fixtures have launched; files in their order, in which
# short ones end the run, so that no process waits long for the other.
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
UNTRAINED := -m "not slow and not trains"

test: install
	$(BIN)/$(PYTEST) -m "not slow"

test-fast: install
	$(BIN)/$(PYTEST) -m "not slow and not trains and not architectures"

test-slow: install
	$(BIN)/python -m pytest -m slow

# The oldest and the newest versions that setup.py allows, each in an environment of its own: docs/versions.md
test-oldest test-newest: test-%:
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e ".[test]"
	$(VENV)-$*/bin/$(PYTEST) $(UNTRAINED)

# In an environment of its own: lm_eval brings some thirty packages.
test-lm-eval:
	test -x $(VENV)-lm-eval/bin/python || $(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)-lm-eval/bin/pip install --quiet --disable-pip-version-check -e ".[lm-eval]" pytest
	$(VENV)-lm-eval/bin/python -c "import lm_eval"  # without it the tests would be skipped
	$(VENV)-lm-eval/bin/python -m pytest tests/recipes/test_lm_eval.py tests/recipes/test_smollm2_lm_eval.py

# In an environment with NVFlare: docs/deploying.md
$(VENV)-nvflare/.installed: setup.py constraints.txt
	test -x $(VENV)-nvflare/bin/python || $(PYTHON) -m venv $(VENV)-nvflare
	$(VENV)-nvflare/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)-nvflare/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[nvflare,test]"
	touch $@

# Owner and sites as real processes of this machine: a run and its continuation, then what takes a quarter of an hour.
test-deployment: $(VENV)-nvflare/.installed
	$(VENV)-nvflare/bin/python -m pytest tests/engines tests/cli/test_deployment_commands.py --ignore-glob "*/test_namespace*" -m "not thorough and not trains"

test-deployment-thorough: $(VENV)-nvflare/.installed
	$(VENV)-nvflare/bin/python -m pytest tests/engines --ignore-glob "*/test_namespace*" -m "thorough or trains"

# Each on a machine of its own, which is a network namespace: Linux alone, and as root.
test-namespaces: $(VENV)-nvflare/.installed
	$(VENV)-nvflare/bin/python -m pytest tests/engines/test_namespaces.py tests/engines/test_namespace_faults.py

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
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-lm-eval $(VENV)-nvflare outputs build *.egg-info
