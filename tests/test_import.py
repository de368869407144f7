"""What `import fedbiot_trainer`, and the use of its names, change in a process: the telemetry is off, and nothing else."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedbiot_trainer


PACKAGE = Path(fedbiot_trainer.__file__).parent
SWITCHES = (
    "HF_HUB_DISABLE_TELEMETRY",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "CI",
)


def run(script: str, *arguments: str, **environment: str):
    """What a script prints as JSON, in a process of its own with this package and these switches."""
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    clean |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TELEMETRY = """
import json
from unittest import mock
{imports}
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
with mock.patch.object(_telemetry, "_start_telemetry_thread"):  # what it is asked to send stays in its queue
    _telemetry.send_telemetry("fedbiot/test")
    print(json.dumps([not _telemetry._TELEMETRY_QUEUE.empty(), constants.HF_HUB_DISABLE_TELEMETRY]))
"""
ORDERS = {
    "first": "import fedbiot_trainer",
    "after_the_hub": "import huggingface_hub, huggingface_hub.constants; import fedbiot_trainer",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "environment, sends",
    [
        ({}, False),
        ({"HF_HUB_DISABLE_TELEMETRY": ""}, False),
        ({"HF_HUB_DISABLE_TELEMETRY": "1"}, False),
        ({"HF_HUB_DISABLE_TELEMETRY": "yes"}, False),
        ({"HF_HUB_DISABLE_TELEMETRY": "0"}, True),
        ({"HF_HUB_DISABLE_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}, False),
        ({"HF_HUB_DISABLE_TELEMETRY": "0", "DO_NOT_TRACK": "1"}, False),
        ({"HF_HUB_OFFLINE": "1"}, False),
        ({"DO_NOT_TRACK": "1"}, False),
        ({"DO_NOT_TRACK": "0"}, False),
    ],
    ids=str,
)
def test_telemetry(order, environment, sends):
    sent, disabled = run(TELEMETRY.format(imports=ORDERS[order]), **environment)
    assert sent == sends
    assert disabled != sends or "HF_HUB_OFFLINE" in environment


def test_telemetry_is_on_without_this_package():
    assert run(TELEMETRY.format(imports="")) == [True, False]  # or the test above would show nothing


# What a process is made of that an import could change. Imports what is to be there already, then looks, then uses the
# names, then looks again.
WATCH = """
import json, logging, os, random, signal, sys, threading, warnings

libraries, names = sys.argv[1].split(), sys.argv[2].split()
for library in libraries:
    __import__(library)

def state():
    found = {
        "environment": dict(os.environ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signals": {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
        "warnings": [str(entry) for entry in warnings.filters],
        "loggers": {
            name: [[repr(handler) for handler in logger.handlers], logger.level, logger.propagate, logger.disabled]
            for name, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]
            if isinstance(logger, logging.Logger) and not name.startswith("fedbiot_trainer")
        },
        "random": hash(random.getstate()),
        "folder": os.getcwd(),
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, threading.excepthook, *sys.path_hooks)],
        "path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
    }
    if "torch" in sys.modules:
        import numpy, torch
        found |= {
            "torch": torch.get_rng_state().tolist(),
            "numpy": str(numpy.random.get_state()),
            "dtype": str(torch.get_default_dtype()),
            "torch settings": [
                torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, str(torch.get_default_device()),
            ],
        }
    return found

doings, watching = [], False
def hear(event, arguments):
    written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if watching and (written or event in ("os.mkdir", "os.remove", "os.rename", "socket.connect", "subprocess.Popen")):
        doings.append([event, str(arguments)])
sys.addaudithook(hear)

modules, before, watching = set(sys.modules), state(), True
import fedbiot_trainer
for name in names:
    getattr(fedbiot_trainer, name)
watching, after = False, state()
changed = {
    key: [value for value in (before[key], after[key])]
    for key in before
    # A logger that a library makes for a module of its own which was not imported before has nothing of its own.
    if (before[key] != after[key] if key != "loggers" else any(after[key][name] != old for name, old in before[key].items()))
}
new = {module.partition(".")[0] for module in set(sys.modules) - modules} - set(sys.stdlib_module_names)
print(json.dumps({"changed": changed, "doings": doings, "new": sorted(new)}))
"""


def test_import_alone_changes_one_thing():
    found = run(WATCH, "", "")
    before, after = found["changed"].pop("environment")
    assert found == {"changed": {}, "doings": [], "new": ["fedbiot_trainer"]}
    assert after == before | {"HF_HUB_DISABLE_TELEMETRY": "1"}


def test_import_changes_nothing_where_telemetry_is_allowed():
    assert run(WATCH, "", "", HF_HUB_DISABLE_TELEMETRY="0")["changed"] == {}


def libraries() -> list[str]:
    """All that the package's modules import of others, when they are imported themselves."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        # Metrics are scripts, which `evaluate` loads, and an engine is imported by nobody but its own commands.
        if not {"metrics", "engines"} & set(file.parts):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module)
                elif isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
    return sorted(name for name in found if name.partition(".")[0] not in sys.stdlib_module_names)


def test_use_of_the_names_changes_nothing():
    """Beyond what the libraries do to a process themselves, by being imported."""
    # Transformers and others import what they need of themselves when it is asked for.
    first = [*libraries(), "transformers.models.auto.modeling_auto", "trl.trainer.sft_trainer"]
    found = run(WATCH, " ".join(first), " ".join(fedbiot_trainer.__all__), HF_HUB_DISABLE_TELEMETRY="1")
    assert found["changed"] == {}
    assert found["doings"] == []
    assert "fedbiot_trainer" in found["new"]


def test_names_are_those_that_are_promised():
    assert set(fedbiot_trainer.__all__) <= set(dir(fedbiot_trainer))
    for name in fedbiot_trainer.__all__:
        assert getattr(fedbiot_trainer, name) is not None
    with pytest.raises(AttributeError, match="module 'fedbiot_trainer' has no attribute 'Nothing'"):
        fedbiot_trainer.Nothing  # noqa: B018
