"""On a device with memory of its own, which is simulated: no tensor is left on the other, and results are the CPU's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import device_run
import pytest
from conftest import save_files


pytestmark = [pytest.mark.trains, pytest.mark.slow]  # compiles the device for a minute and a half


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory, tokenizer):
    """On the device, and on the CPU."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler to build the device with")
    pytest.importorskip("ninja")
    folder = tmp_path_factory.mktemp("runs")
    save_files(folder, tokenizer)
    command = [sys.executable, HERE.parent / "simulated_device.py", HERE / "device_run.py"]
    command += [folder / "base", folder / "device"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]
    on_device = json.loads(run.stdout.splitlines()[-1])
    return on_device, device_run.results(str(folder / "base"), str(folder / "cpu"), use_cpu=True)


@pytest.mark.parametrize("name", [*device_run.RUNS, "parties"])
def test_results_are_those_of_the_cpu(results, name):
    on_device, on_cpu = results
    assert on_device[name] == pytest.approx(on_cpu[name], rel=1e-2 if name == "autocast" else 1e-4)
    assert all(on_device[name].values())
