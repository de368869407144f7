"""Owner and three sites by their commands: real processes of this machine over NVFlare, against the run in one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_same, save_files, sums

from fedbiot_trainer.shared.lora_state import load_lora


pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")
pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SITES = {"north": sums(0, 8), "south": sums(8, 12), "west": sums(12, 16)}
ADMINISTRATOR = "owner@fedbiot.org"
SETTINGS = {
    "num_rounds": 3, "local_steps": 2, "initial_alignment_steps": 3, "alignment_steps": 2, "alignment_batch_size": 4,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "lora_r": 4, "lora_alpha": 8,
    "lora_dropout": 0.0, "lora_target_modules": "all-linear", "client_zero_shot_examples": 4,
    "load_best_model_at_end": False,  # what is compared is the last round
}  # fmt: skip
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


def fedbiot(*words, **kwargs):
    command = [sys.executable, "-m", "fedbiot_trainer", *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = save_files(
        tmp_path_factory.mktemp("deployment"), tokenizer, public=sums(40, 50), test=sums(50, 55), **SITES
    )
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            SETTINGS
            | {
                "model_name_or_path": "base",
                "public_dataset_name": "public.jsonl",
                "eval_dataset_name": "test.jsonl",
                "teacher_cache_dir": "cache",
                "output_dir": "served",
            }
        )  # fmt: skip
    )
    (folder / "site.yaml").write_text(yaml.safe_dump({"use_cpu": True, "max_local_steps": 5}))
    return folder


@pytest.fixture(scope="module")
def kits(folder):
    """Startup kits of a server and sites that are running."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    made = fedbiot(
        "provision", "--host", "localhost", "--port", port, "--sites", *SITES, "--output_dir", folder / "kits"
    )
    assert made.returncode == 0, made.stderr[-3000:]
    kits = {line.split()[0]: Path(line.split()[1]) for line in made.stdout.splitlines() if line}
    running: dict[str, subprocess.Popen] = {}

    def start(name, *command):
        if name in running:
            stop(name)
        with (folder / f"{name}.log").open("a") as log:
            running[name] = subprocess.Popen(
                [str(word) for word in command],
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )

    def stop(name):
        process = running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def join(name, config="site.yaml"):
        words = ["--kit", kits[name], "--data", f"{name}.jsonl", "--config", config]
        before = registrations(name)
        start(name, sys.executable, "-m", "fedbiot_trainer", "join", *words)
        return lambda: registrations(name) > before

    def registrations(name):
        log = folder / f"{name}.log"
        return log.read_text().count("Successfully registered client") if log.is_file() else 0

    start("owner", kits["owner"] / "startup" / "sub_start.sh", "--once")
    for name in SITES:
        join(name)
    kits["join"] = join
    yield kits
    for name in list(running):
        stop(name)


@pytest.fixture(scope="module")
def whole(folder):
    """The client LoRA of the run in one process."""
    clients = [f"{name}={name}.jsonl" for name in SITES]
    run = fedbiot("train", "--config", "run.yaml", "--output_dir", "whole", "--client_datasets", *clients, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return load_lora(folder / "whole" / "client_lora")[1]


def serve_command(kits, *flags):
    words = ["--kit", kits[ADMINISTRATOR], "--min_sites", 3, "--patience", 120, "--config", "run.yaml", *flags]
    return ["serve", *words]


def serve(folder, kits, *flags):
    return fedbiot(*serve_command(kits, *flags), cwd=folder)


@contextmanager
def serving(folder, kits, output_dir, *flags):
    """A run that goes on in the block, of which some rounds have ended."""
    command = serve_command(kits, "--output_dir", output_dir, *flags)
    served = subprocess.Popen(
        [sys.executable, "-m", "fedbiot_trainer", *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )
    before = rounds_in(folder / output_dir)
    wait_until(lambda: served.poll() is not None or rounds_in(folder / output_dir) >= before + 2)
    assert served.poll() is None
    yield served
    served.kill()
    served.communicate()


def rounds_in(output_dir):
    file = output_dir / "rounds.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_until(holds, seconds=300):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_run_of_three_parties_is_the_run_in_one_process(folder, kits, whole):
    served = serve(folder, kits)
    assert served.returncode == 0, served.stderr[-3000:]
    assert_same(load_lora(folder / "served" / "client_lora")[1], whole)
    assert "round 3/3" in served.stdout and "Result on held-out text" in served.stdout
    rounds = [json.loads(line) for line in (folder / "served" / "rounds.jsonl").read_text().splitlines()]
    assert all(set(record["client_losses"]) == set(SITES) for record in rounds)
    said = (folder / "north.log").read_text()
    assert "site north: 24 examples of north.jsonl" in said and "No text, no token, no path." in said


def test_a_served_run_goes_on(folder, kits):
    flags = ["--num_rounds", "5", "--resume_from_checkpoint", "true"]
    served = serve(folder, kits, *flags)
    assert served.returncode == 0, served.stderr[-3000:]
    assert "going on after round 3" in served.stdout
    assert len((folder / "served" / "rounds.jsonl").read_text().splitlines()) == 5


@pytest.mark.thorough
def test_a_run_goes_on_when_the_engine_loses_a_process(folder, kits):
    """NVFlare's own process of the job at a site, without which it ends the job for all."""
    with serving(folder, kits, "lost", "--num_rounds", 12) as served:
        found = [
            int(process.parent.name)
            for process in Path("/proc").glob("[0-9]*/cmdline")
            if "worker_process" in (command := process.read_text()) and str(kits["north"]) in command
        ]
        assert len(found) == 1
        os.kill(found[0], signal.SIGKILL)
        said, _ = served.communicate(timeout=300)
    assert served.returncode == 0, said[-3000:]
    assert "NVFlare has ended the run. It goes on from its state." in said and "going on after round" in said
    rounds = (folder / "lost" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["server_round"] for line in rounds] == list(range(1, 13))


@pytest.mark.thorough
def test_a_run_that_is_stopped_goes_on_without_a_site_that_was_revoked(folder, kits):
    kit = ["--kit", kits[ADMINISTRATOR]]
    with serving(folder, kits, "stopped", "--num_rounds", 1000, "--patience", 30) as served:
        said = fedbiot("status", *kit).stdout
        assert "site    north: connected" in said and f"run     going on, in {folder / 'stopped'}" in said
        assert "is the last that has ended; answers of " in said
        second = serve(folder, kits, "--output_dir", "second")
        assert f"process {served.pid} serves the run of '{folder / 'stopped'}'" in second.stderr
        assert fedbiot("revoke", *kit, "west").stdout.endswith("west may not connect any more.\n")
        revoked = rounds_in(folder / "stopped") + 1
        wait_until(lambda: rounds_in(folder / "stopped") >= revoked + 2)
        stopped = fedbiot("stop", *kit)
        said, _ = served.communicate(timeout=60)
    assert stopped.returncode == 0 and "has ended. To go on: --resume_from_checkpoint true" in stopped.stdout
    assert served.returncode == 128 + signal.SIGTERM and "NVFlare ends the run. Its state is on disk." in said
    ended = [json.loads(line) for line in (folder / "stopped" / "rounds.jsonl").read_text().splitlines()]
    assert set(ended[0]["weights"]) == set(SITES)
    assert all(set(record["weights"]) == {"north", "south"} for record in ended[revoked:])
    assert f"run     stopped, in {folder / 'stopped'}" in fedbiot("status", *kit).stdout
    assert "with which no run is going on" in fedbiot("stop", *kit).stderr
    # It was shut out for good, and not the others.
    flags = ["--num_rounds", len(ended) + 2, "--resume_from_checkpoint", "true", "--min_sites", 2]
    assert serve(folder, kits, "--output_dir", "stopped", *flags).returncode == 0
    assert set(json.loads((folder / "stopped" / "rounds.jsonl").read_text().splitlines()[-1])["weights"]) == {
        "north",
        "south",
    }
    assert fedbiot("revoke", *kit, "west", "--undo").stdout.endswith("west may connect again.\n")


@pytest.mark.thorough
def test_a_site_refuses_beyond_its_limits(folder, kits):
    served = serve(folder, kits, "--output_dir", "refused", "--local_steps", "6")
    assert served.returncode == 1
    assert "The round has 6 local steps, and this site takes 5 at most." in served.stdout


def test_what_the_owner_cannot_ask_for_is_said_before_anything_is_sent(folder, kits):
    started = time.monotonic()
    served = serve(folder, kits, "--client_datasets", "north=north.jsonl")
    assert served.returncode == 1
    assert (
        "`client_datasets` is ['north=north.jsonl'], but the clients have their text at their sites." in served.stderr
    )
    assert time.monotonic() - started < 120


@pytest.mark.thorough
@pytest.mark.parametrize("launch", ["ddp", "zero2", "zero3"])
def test_a_site_of_two_processes_comes_to_the_same(folder, kits, whole, launch):
    """One that is started anew, with other hardware."""
    config = ROOT / "accelerate_configs" / "cpu" / f"{launch}.yaml"
    settings = {"use_cpu": True, "per_device_train_batch_size": 1, "accelerate_config": str(config)}
    (folder / f"{launch}.yaml").write_text(yaml.safe_dump(settings))
    wait_until(kits["join"]("west", f"{launch}.yaml"))
    served = serve(folder, kits, "--output_dir", launch)
    assert served.returncode == 0, served.stderr[-3000:]
    rounds = [json.loads(line) for line in (folder / launch / "rounds.jsonl").read_text().splitlines()]
    assert all(set(record["client_losses"]) == set(SITES) for record in rounds)
    (_, ours) = load_lora(folder / launch / "client_lora")
    one, other = (torch.cat([lora[key].flatten() for key in sorted(whole)]) for lora in (ours, whole))
    assert not torch.equal(one, other)  # sums in another order
    assert (one - other).norm() < 1e-5 * other.norm()
