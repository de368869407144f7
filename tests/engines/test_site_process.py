"""The site's process and what starts, asks and ends it, without any engine between them and an owner."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedbiot_trainer.engines.errors import SiteError
from fedbiot_trainer.engines.nvflare.process import SiteProcess, Stopped
from fedbiot_trainer.engines.nvflare.site import load


pytestmark = pytest.mark.trains

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "fedbiot_trainer.engines.nvflare.site", "nvflare_parts:ObedientSite", "hospital"]


@pytest.fixture
def process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    process = SiteProcess(COMMAND, tmp_path / "site.log")
    yield process
    process.end()


def ask(process: SiteProcess, kind: str, text: str = "", seconds: float = 60.0) -> tuple[str, str]:
    deadline = time.monotonic() + seconds
    reply, payload = process.ask(kind, [text.encode()], lambda: time.monotonic() > deadline)
    return reply, payload.decode()


def wait_until_gone(pid: int):
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_process_answers_all_requests(process):
    first, second = ask(process, "who"), ask(process, "who")
    assert first == second
    assert first[1].split()[0] == "hospital"


def test_a_payload_may_come_in_parts(process):
    large = os.urandom(3_000_000)
    assert process.ask("echo", [large[:1], b"", memoryview(large)[1:]], lambda: False) == ("answer", large)


def test_of_a_failure_only_the_class_is_said(process):
    assert ask(process, "raise", "Mrs Miller has a cold") == ("error", "ValueError")
    assert "Mrs Miller" in process.log.read_text()
    assert ask(process, "who")[0] == "answer"


def test_a_site_error_is_said_in_full(process):
    assert ask(process, "refuse", "8 bits") == ("error", "SiteError: 8 bits cannot be done here")


def test_the_answer_to_a_request_that_was_given_up_is_dropped(process):
    before = ask(process, "who")
    with pytest.raises(Stopped):
        ask(process, "sleep", "1", seconds=0.3)
    time.sleep(1.5)
    assert ask(process, "echo", "new") == ("answer", "new")
    assert ask(process, "who") == before


def test_a_process_that_is_still_at_what_was_given_up_is_replaced(process):
    _, before = ask(process, "who")
    with pytest.raises(Stopped):
        ask(process, "sleep", "600", seconds=0.3)
    assert alive(int(before.split()[1]))  # it may still finish
    _, after = ask(process, "who")
    assert after != before
    wait_until_gone(int(before.split()[1]))


def test_a_process_that_dies_is_started_again(process):
    _, before = ask(process, "who")
    with pytest.raises(SiteError, match="process died"):
        ask(process, "die")
    assert "died when asked for die, exit code -9" in process.log.read_text()
    _, after = ask(process, "who")
    assert after != before


def test_a_process_that_died_between_two_requests_is_started_for_the_second(process):
    pid = int(ask(process, "who")[1].split()[1])
    os.kill(pid, signal.SIGKILL)
    process._process.wait(20)  # a thread may outlive the one by which the process is known
    reply, after = ask(process, "who")
    assert reply == "answer"
    assert int(after.split()[1]) != pid
    assert "died when asked for nothing, exit code -9" in process.log.read_text()


def test_a_process_that_cannot_start_is_an_error(tmp_path):
    process = SiteProcess([sys.executable, "-c", "raise SystemExit('no model here')"], tmp_path / "site.log")
    with pytest.raises(SiteError, match="process died"):
        ask(process, "who")
    assert "no model here" in process.log.read_text()
    with pytest.raises(SiteError, match="process died"):
        ask(SiteProcess([str(tmp_path / "no-such-program")], tmp_path / "site.log"), "who")


def test_with_the_process_ends_what_it_has_started(process):
    pids = [int(ask(process, "who")[1].split()[1]), int(ask(process, "child")[1])]
    assert all(map(alive, pids))
    process.end()
    for pid in pids:
        wait_until_gone(pid)


def test_no_process_outlives_the_one_that_asks(process, tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from fedbiot_trainer.engines.nvflare.process import SiteProcess
process = SiteProcess({COMMAND!r}, Path({str(tmp_path / "other.log")!r}))
for kind in ("who", "child"):
    print(process.ask(kind, [], lambda: False)[1].decode().split()[-1], flush=True)
process.ask("sleep", [b"600"], lambda: False)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    time.sleep(0.3)
    assert all(map(alive, pids))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    for pid in pids:
        wait_until_gone(pid)


def test_it_needs_neither_an_engine_nor_torch():
    """What a site runs is its own choice, and starts at once."""
    script = "import sys, fedbiot_trainer.engines.nvflare.process; print({'nvflare', 'torch'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE.parents[1])
    assert result.stdout.strip() == "set()", result.stderr


def test_a_function_is_named_by_module_and_name():
    assert load("os.path:join") is os.path.join
    with pytest.raises(ValueError, match="names no function"):
        load("os.path.join")


@pytest.mark.slow
def test_a_launcher_starts_several_processes_that_all_get_each_request(process):
    config = HERE.parents[1] / "accelerate_configs" / "cpu" / "ddp.yaml"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--main_process_port",
        "0",
        "--config_file",
        str(config),
    ]
    process.command = [*launch, *COMMAND[1:]]
    assert ask(process, "ranks") == ("answer", "0 of 2, together 1")
    assert ask(process, "raise") == ("error", "ValueError")
    # One fails alone while the other waits for it: both are ended, and start again.
    assert ask(process, "rank fails", "1") == ("error", "ValueError")
    assert ask(process, "ranks") == ("answer", "0 of 2, together 1")
