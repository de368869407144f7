"""A federation of real processes on this machine: a server, three sites, and jobs that the administrator submits."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")

from fedbiot_trainer.engines.nvflare.administrator import open_session, wait_for_sites
from fedbiot_trainer.engines.nvflare.executor import SITE_FILE
from fedbiot_trainer.engines.nvflare.job import write_job
from fedbiot_trainer.engines.nvflare.provision import EXECUTOR, provision


pytestmark = [pytest.mark.slow, pytest.mark.thorough]

HERE = Path(__file__).parent
SITES = ["north", "south", "west"]
ADMINISTRATOR = "owner@fedbiot.org"
PRIVATE = "Mrs Miller has a cold"
MEGABYTE = 1_000_000


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """The administrator's session, and a folder for jobs."""
    folder = tmp_path_factory.mktemp("federation")
    kits = provision(folder, "localhost", free_port(), SITES, ADMINISTRATOR)
    # The kits' scripts call `python3`.
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    module = "fedbiot_trainer.engines.nvflare.site"
    for site in SITES:
        command = [sys.executable, "-m", module, "nvflare_parts:ObedientSite", site]
        (kits[site] / "local" / SITE_FILE).write_text(json.dumps({"command": command}))
    processes = []
    for name in ("owner", *SITES):
        with (folder / f"{name}.log").open("w") as log:
            start = [str(kits[name] / "startup" / "sub_start.sh"), "--once"]
            processes.append(
                subprocess.Popen(start, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
            )
    session = None
    try:
        session = open_session(kits[ADMINISTRATOR], timeout=120)
        assert wait_for_sites(session, SITES, timeout=120) == SITES
        yield session, folder, kits
    finally:
        if session is not None:
            session.close()
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def submit(federation, asks: list) -> tuple[str, Path]:
    session, folder, _ = federation
    script = folder / f"{time.time_ns()}.json"
    script.write_text(json.dumps(asks))
    job = write_job(folder / "job", "nvflare_parts:owner", str(script))
    return session.submit_job(str(job)), script.with_suffix(".answer")


def wait_for(file: Path, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.2)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def asked(federation):
    """The questions of one job by their names here, and what its function says of them."""
    asks = {
        "first": ["who", None, 120, 0],
        "second": ["who", None, 120, 0],
        "small": ["echo", None, 120, 1000],
        "large": ["echo", None, 120, 20 * MEGABYTE],
        "raises": ["raise", {"north": PRIVATE}, 120, 0],
        "refuses": ["refuse", {"north": "8 bits", "south": "4 bits"}, 120, 0],
        "late": ["sleep", {"north": "600", "south": "0"}, 3, 0],
        "after late": ["who", None, 120, 0],
        "dies": ["die", {"south": ""}, 120, 0],
        "after death": ["who", None, 120, 0],
        "absent": ["who", {"nobody": "", "west": ""}, 120, 0],
    }
    job, file = submit(federation, list(asks.values()))
    found = wait_for(file)
    assert federation[0].wait_for_job(job, timeout=120)["status"] == "FINISHED:COMPLETED"
    return dict(zip(asks, found["results"], strict=True))


@pytest.fixture(scope="module")
def answers(asked):
    """What came of each question: the replies by site."""
    return {name: {reply["client"]: reply for reply in result["replies"]} for name, result in asked.items()}


def test_all_sites_are_asked_and_each_answer_has_its_name(answers):
    assert sorted(answers["first"]) == SITES
    for site, reply in answers["first"].items():
        assert reply["payload"].split()[0] == site
        assert reply["error"] is None


def test_the_same_processes_answer_again(answers):
    assert {site: reply["payload"] for site, reply in answers["first"].items()} == {
        site: reply["payload"] for site, reply in answers["second"].items()
    }


@pytest.mark.parametrize("name, size", [("small", 1000), ("large", 20 * MEGABYTE)])
def test_payloads_come_back_as_they_were(answers, name, size):
    assert [reply["size"] for reply in answers[name].values()] == [size] * 3
    assert all(reply["same"] for reply in answers[name].values())


def test_payloads_are_let_go_with_the_last_reply(asked):
    """NVFlare's tasks refer to themselves: what they kept would stay until Python looks for such cycles."""
    assert [name for name, result in asked.items() if result["kept"]] == []


def test_what_an_exception_says_stays_at_the_site(federation, answers):
    assert answers["raises"]["north"]["error"] == "ValueError"
    assert list(answers["raises"]) == ["north"]
    _, folder, kits = federation
    told = [path for path in kits["north"].rglob("site.log") if PRIVATE in path.read_text(errors="replace")]
    assert len(told) == 1
    for path in [folder / "owner.log", *kits["owner"].rglob("*.txt"), *kits["owner"].rglob("*.log")]:
        assert PRIVATE not in path.read_text(errors="replace").replace(f'{{"north": "{PRIVATE}"}}', "")


def test_a_site_may_say_what_it_will_not_do(answers):
    assert answers["refuses"]["north"]["error"] == "SiteError: 8 bits cannot be done here"
    assert answers["refuses"]["south"]["error"] == "SiteError: 4 bits cannot be done here"


def test_a_late_site_holds_up_nobody(answers):
    assert answers["late"]["north"]["error"] == "TimeoutError: it took longer than 3 s"
    assert answers["late"]["north"]["seconds"] == pytest.approx(3, abs=1)
    assert answers["late"]["south"]["payload"] == answers["first"]["south"]["payload"]
    # Its process was still at it, and was replaced.
    assert answers["after late"]["north"]["payload"].split()[0] == "north"
    assert answers["after late"]["north"]["payload"] != answers["first"]["north"]["payload"]
    assert answers["after late"]["west"]["payload"] == answers["first"]["west"]["payload"]


def test_a_process_that_was_killed_comes_back(answers):
    assert answers["dies"]["south"]["error"].startswith("SiteError: The site's process died.")
    assert answers["after death"]["south"]["payload"].split()[0] == "south"
    assert answers["after death"]["south"]["payload"] != answers["late"]["south"]["payload"]


def test_a_site_that_is_not_there_is_an_error(answers):
    assert answers["absent"]["nobody"]["error"] == "ConnectionError: it is not connected"
    assert answers["absent"]["west"]["payload"] == answers["first"]["west"]["payload"]


def test_no_process_of_a_site_outlives_its_job(answers):
    for replies in (answers["first"], answers["after late"], answers["after death"]):
        for reply in replies.values():
            assert not Path("/proc", reply["payload"].split()[1]).exists()


@pytest.mark.parametrize("attack", ["another class", "code in the job"])
def test_no_job_makes_a_site_run_anything_else(federation, tmp_path, attack):
    session, folder, _ = federation
    job = write_job(folder / "attack", "nvflare_parts:owner", str(folder / "no-script.json"))
    config = job / "app" / "config" / "config_fed_client.json"
    client = json.loads(config.read_text())
    if attack == "another class":
        path = "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor"
        arguments = {"execution_mode": "external_process", "command": ["touch", str(tmp_path / "breach")]}
    else:
        custom = job / "app" / "custom"
        custom.mkdir()
        code = f"open({str(tmp_path / 'breach')!r}, 'w')\nfrom {EXECUTOR.rpartition('.')[0]} import SiteExecutor\n"
        (custom / "breach.py").write_text(code)
        path, arguments = "breach.SiteExecutor", {}
    client["executors"][0]["executor"] = {"path": path, "args": arguments}
    config.write_text(json.dumps(client))
    status = session.wait_for_job(session.submit_job(str(job)), timeout=180)["status"]
    assert status.startswith("FINISHED:") and status != "FINISHED:COMPLETED"
    assert not (tmp_path / "breach").exists()


def test_when_a_job_is_aborted_the_function_is_told(federation):
    session, folder, _ = federation
    job, file = submit(federation, [["who", None, 120, 0], ["sleep", {"north": "600"}, None, 0]])
    wait_for(file.with_suffix(".begun"))
    time.sleep(3)
    session.abort_job(job)
    assert wait_for(file)["aborted"] == "JobAborted: NVFlare ends the job."
    assert session.wait_for_job(job, timeout=120)["status"] == "FINISHED:ABORTED"
    shutil.rmtree(folder / "job")
