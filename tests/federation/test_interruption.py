"""Real processes that are told to stop. What happens to the run's state is in test_resume.py."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import save_files, sums

from fedbiot_trainer.cli import train as cli
from fedbiot_trainer.federation.interruption import Interruption, RunInterrupted
from fedbiot_trainer.federation.loop import RoundLoop


pytestmark = pytest.mark.trains


ROOT = Path(__file__).parents[2]
GO_ON = "To go on: --resume_from_checkpoint true"
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
def recipe(tmp_path, tokenizer):
    """The recipe and its flags, with so many rounds that it does not end by itself."""
    save_files(tmp_path, tokenizer, a=sums(0, 8), public=sums(20, 30))
    command = [
        ROOT / "recipes" / "fedbiot_sft.py", "--model_name_or_path", tmp_path / "base",
        "--client_datasets", f"a={tmp_path / 'a.jsonl'}", "--public_dataset_name", tmp_path / "public.jsonl",
        "--output_dir", tmp_path / "out", "--num_rounds", "100000", "--local_steps", "2", "--initial_alignment_steps", "1",
        "--alignment_steps", "1", "--report_to", "none", "--use_cpu", "true", "--teacher_cache_dir", tmp_path / "cache",
    ]  # fmt: skip
    return [str(word) for word in command]


@pytest.fixture
def start(tmp_path, recipe):
    """Start the recipe."""
    processes = []

    def run(launcher):
        with (tmp_path / "log.txt").open("w") as log:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [*LAUNCHERS[launcher], *recipe], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path,
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


ENDS = pytest.mark.parametrize(
    "number, code", [pytest.param(signal.SIGTERM, 143, id="SIGTERM"), pytest.param(signal.SIGINT, 130, id="Ctrl-C")]
)


@ENDS
def test_the_command_ends_after_its_step(recipe, tmp_path, monkeypatch, capsys, number, code):
    """In this process, which is sent the signal as round 2 begins."""
    tell = RoundLoop._tell

    def tell_and_send(self, event, *values):
        tell(self, event, *values)
        if (event, values) == ("on_round_begin", (2,)):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RoundLoop, "_tell", tell_and_send)
    with pytest.raises(SystemExit) as ended:
        cli.main(recipe[1:])
    assert ended.value.code == code
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped by {number.name}. {GO_ON}"
    assert list((tmp_path / "out" / "state").glob("*.safetensors"))
    assert len((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@ENDS
def test_a_run_ends_after_its_step(start, tmp_path, number, code):
    process = start("python")
    process.send_signal(number)
    assert process.wait(60) == code
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last == f"stopped by {number.name}. {GO_ON}"
    assert list((tmp_path / "out" / "state").glob("*.safetensors"))
    assert members(process.pid) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, number",
    [
        ("accelerate launch", signal.SIGKILL),
        *itertools.product(("accelerate launch", "two processes"), (signal.SIGTERM, signal.SIGINT)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_process_is_left_behind(start, tmp_path, launcher, number):
    """A signal to the launcher alone, which forwards it or just goes: with SIGKILL it can do nothing else."""
    process = start(launcher)
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: members(process.pid) == [], 60)
    assert GO_ON in (tmp_path / "log.txt").read_text()
    assert list((tmp_path / "out" / "state").glob("*.safetensors"))


def terminate_twice(heard):
    with Interruption().listening():
        os.kill(os.getpid(), signal.SIGTERM)
        heard.send("still here")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_second_signal_ends_at_once():
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=terminate_twice, args=(there,))
    process.start()
    process.join(30)
    assert (process.exitcode, here.poll() and here.recv()) == (-signal.SIGTERM, "still here")


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interruption = Interruption()
    with interruption.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(RunInterrupted, match="stopped by SIGINT") as raised:
            interruption.check()
    assert raised.value.signal == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
