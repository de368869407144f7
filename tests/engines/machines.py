"""Owner and sites of a federation, each on a machine of a [`namespaces.Network`], started by the commands of `docs/deploying.md`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import yaml
from conftest import save_files, sums
from datasets import Dataset
from namespaces import Network

from fedbiot_trainer.engines.nvflare.executor import SITE_FILE


HERE = Path(__file__).resolve().parent
SITES = ["north", "south", "west"]
OUTSIDER = "outsider"
NAMES = ["owner", *SITES, OUTSIDER]
ADMINISTRATOR = "owner@fedbiot.org"
PORT = 8002
SETTINGS = {
    "model_name_or_path": "base", "public_dataset_name": "public.jsonl", "eval_dataset_name": "test.jsonl",
    "teacher_cache_dir": "cache", "output_dir": "served", "report_to": "none", "use_cpu": True,
    "num_rounds": 3, "local_steps": 2, "initial_alignment_steps": 3, "alignment_steps": 2, "alignment_batch_size": 4,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
    "lora_target_modules": "all-linear", "client_zero_shot_examples": 4,
}  # fmt: skip
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


def secrets(site: str) -> Dataset:
    """Private text that is found nowhere else."""
    told = [f"{site} patient {number} has " for number in range(24)]
    return Dataset.from_dict({"prompt": told, "completion": [f"{number % 7} colds" for number in range(24)]})


def fedbiot(*words: object) -> list[str]:
    return [sys.executable, "-m", "fedbiot_trainer", *map(str, words)]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120.0):
    """
    Look until a condition holds, and give what it gives.

    Raises:
        AssertionError: If it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for: {what}"
        time.sleep(0.1)
    return found


class Served:
    """One call of `fedbiot serve`, and what the owner sees of it."""

    def __init__(self, process: subprocess.Popen, screen: Path, output: Path):
        self.process, self.screen, self.output = process, screen, output

    def said(self) -> str:
        return self.screen.read_text()

    def rounds(self) -> list[dict]:
        """Records of the rounds that have ended."""
        file = self.output / "rounds.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for_round(self, condition: Callable[[dict], object], since: int, seconds: float = 120.0) -> dict:
        """The first round after `since` of which a condition holds."""

        def found():
            ended = self.process.poll() is not None
            record = next((record for record in self.rounds()[since:] if condition(record)), None)
            assert record or not ended, self.said()[-3000:]
            return record

        return wait_for(found, f"a round after {since}; the owner saw {self.said()[-1500:]}", seconds)

    def end(self, seconds: float = 300.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout=seconds)

    def stop(self) -> int:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.end(60)


class Federation:
    """
    Args:
        network ([`namespaces.Network`]): Machines, named [`NAMES`].
        folder (`Path`): Holds a folder for each.
    """

    def __init__(self, network: Network, folder: Path, tokenizer):
        self.network, self.folder = network, folder
        self.started: list[subprocess.Popen] = []
        for name in NAMES:
            self.home(name).mkdir()
        save_files(self.home("owner"), tokenizer, public=sums(40, 50), test=sums(50, 55))
        (self.home("owner") / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
        for site in SITES:
            secrets(site).to_json(self.home(site) / "secret.jsonl")
            (self.home(site) / "site.yaml").write_text(yaml.safe_dump({"use_cpu": True}))
        self.kits = self.provision("kits")
        for site in SITES:  # handed over; the owner keeps nothing but the certificate authority's
            shutil.copytree(self.kits[site], self.kit(site))

    def home(self, name: str) -> Path:
        return self.folder / f"machine-of-{name}"

    def kit(self, site: str) -> Path:
        return self.home(site) / site

    def provision(self, output: str) -> dict[str, Path]:
        words = ["--host", self.network.addresses["owner"], "--port", PORT, "--sites", *SITES, "--output_dir", output]
        made = self.run("owner", fedbiot("provision", *words))
        assert made.returncode == 0, made.stderr[-3000:]
        return {line.split()[0]: Path(line.split()[1]) for line in made.stdout.splitlines() if line}

    def run(self, name: str, command: list[str], **kwargs) -> subprocess.CompletedProcess:
        kwargs = {
            "env": ENVIRONMENT,
            "cwd": self.home(name),
            "capture_output": True,
            "text": True,
            "timeout": 300,
        } | kwargs
        return self.network.run(name, command, **kwargs)

    def start(self, name: str, command: list[object], screen: str) -> subprocess.Popen:
        """A command on a machine, whose output goes to a file in its folder."""
        with (self.home(name) / screen).open("a") as log:
            process = self.network.start(
                name, command, env=ENVIRONMENT, cwd=self.home(name), stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(process)
        return process

    def start_owner(self):
        """The owner's server; also after its machine went down, whose processes have no numbers any more."""
        (self.kits["owner"] / "daemon_pid.fl").unlink(missing_ok=True)
        self.start("owner", [self.kits["owner"] / "startup" / "start.sh"], "server.txt")

    def join(self, site: str, *flags: object, within: tuple[str, ...] = ()) -> Callable[[], bool]:
        """A site takes part. Gives what says whether it is connected."""
        before = self.registrations(site)
        words = ["--kit", site, "--data", "secret.jsonl", "--config", "site.yaml", *flags]
        self.start(site, [*within, *fedbiot("join", *words)], "join.txt")
        return lambda: self.registrations(site) > before

    def registrations(self, site: str) -> int:
        log = self.home(site) / "join.txt"
        return len(re.findall("Successfully registered client", log.read_text())) if log.is_file() else 0

    def command(self, site: str, function: str):
        """Have a site serve what a function of the tests makes of the file that `join` wrote."""
        file = self.kit(site) / "local" / SITE_FILE
        *launch, _, argument = json.loads(file.read_text())["command"]
        file.write_text(json.dumps({"command": [*launch, function, argument]}))

    def serve(self, *flags: object, output: str = "served") -> Served:
        screen = f"serve-{time.monotonic_ns()}.txt"
        words = ["--kit", self.kits[ADMINISTRATOR], "--min_sites", 3, "--patience", 120, "--config", "run.yaml"]
        process = self.start("owner", fedbiot("serve", *words, "--output_dir", output, *flags), screen)
        return Served(process, self.home("owner") / screen, self.home("owner") / output)

    def leaks(self) -> list[str]:
        """What the owner's machine has of the sites' text and paths, by file, also of what NVFlare has archived."""
        private = [str(self.home(site)) for site in SITES]
        private += [prompt for site in SITES for prompt in secrets(site)["prompt"]]
        found = []
        for file in filter(Path.is_file, self.home("owner").rglob("*")):
            contents = [file.read_bytes()]
            if is_zipfile(file):
                with ZipFile(file) as archive:
                    contents += map(archive.read, archive.namelist())
            found += [f"{file}: {text}" for text in private if any(text.encode() in content for content in contents)]
        return found

    def end(self):
        for name in NAMES:
            self.network.kill(name)
        for process in self.started:
            process.wait()
