"""Real processes that are told to stop. What happens to the run's state is in test_resume.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import save_files, sums

from fedbiot_trainer.federation.interruption import Interruption, RunInterrupted


pytestmark = pytest.mark.trains


ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate launch": [
        *LAUNCH, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    ],
    "two processes": [
        *LAUNCH, "--config_file", str(ROOT / "accelerate_configs/cpu/ddp.yaml"), "--main_process_port", "0",
    ],
}  # fmt: skip


@pytest.fixture
def start(tmp_path, tokenizer):
    """Start the recipe with so many rounds that it does not end by itself."""
    save_files(tmp_path, tokenizer, a=sums(0, 8), public=sums(20, 30))
    processes = []

    def run(launcher):
        command = [
            *LAUNCHERS[launcher], str(ROOT / "recipes" / "fedbiot_sft.py"), "--model_name_or_path", tmp_path / "base",
            "--client_datasets", f"a={tmp_path / 'a.jsonl'}", "--public_dataset_name", tmp_path / "public.jsonl",
            "--output_dir", tmp_path / "out", "--num_rounds", "100000", "--local_steps", "2", "--initial_alignment_steps", "1",
            "--alignment_steps", "1", "--report_to", "none", "--use_cpu", "true", "--teacher_cache_dir", tmp_path / "cache",
        ]  # fmt: skip
        with (tmp_path / "log.txt").open("w") as log:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path,
                start_new_session=True,
            )  # fmt: skip
        processes.append(process)
        wait_for(lambda: "round      2/" in (tmp_path / "log.txt").read_text() or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
        return process

    yield run
    for process in processes:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def members(group):
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize(
    "number, code",
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_after_its_step(start, tmp_path, number, code):
    process = start("python")
    process.send_signal(number)
    assert process.wait(60) == code
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last == f"stopped by {number.name}. To go on: --resume_from_checkpoint true"
    assert list((tmp_path / "out" / "state").glob("*.safetensors"))
    assert members(process.pid) == []


@pytest.mark.parametrize(
    "launcher", ["accelerate launch", pytest.param("two processes", marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=str)
def test_no_process_is_left_behind(start, tmp_path, launcher, number):
    """A signal to the launcher alone, which forwards it or just goes."""
    process = start(launcher)
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: members(process.pid) == [], 60)
    assert "To go on: --resume_from_checkpoint true" in (tmp_path / "log.txt").read_text()
    assert list((tmp_path / "out" / "state").glob("*.safetensors"))


def test_a_launcher_that_is_killed_leaves_no_process(start):
    process = start("accelerate launch")
    process.kill()
    wait_for(lambda: members(process.pid) == [], 60)


def test_a_second_signal_ends_at_once():
    code = """
import os, signal, sys, time
from fedbiot_trainer.federation.interruption import Interruption
interruption = Interruption()
with interruption.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "still here\n")


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interruption = Interruption()
    with interruption.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(RunInterrupted, match="stopped by SIGINT") as raised:
            interruption.check()
    assert raised.value.signal == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
