"""
A run of an owner and sites over NVFlare, each party by its command and in processes of its own on this machine, against the
same run in one process. It needs `pip install -e ".[nvflare]"`.

    s / round     from the end of a round to the end of the next, without the first
    MB payload    what the round's records say, of all sites, both ways
    MB loopback   what the loopback device carried in the same time, with TLS, TCP and the engine's own talk, also between
                  processes of one party. It is read in a network namespace of the benchmark's own, and left out where none
                  can be made
    peak MB       largest proportional set size (PSS) of the owner's processes, and the largest of a site's

Sites train side by side, one thread each; in one process they take turns. With one site (`--sites 1`) the ratio is what the
engine adds to a round.

    python benchmarks/deployment.py --json deployment.json
    python benchmarks/deployment.py --sites 1 --hidden_size 576 --num_layers 30 --vocab_size 49152 --intermediate_size 1536
    python benchmarks/deployment.py --sites 30 --hidden_size 32 --num_layers 6 --local_steps 2 --num_tokens 50
    python benchmarks/deployment.py --package_gb 2
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import psutil
import yaml
from common import parser, random_llama, show, spread, word_tokenizer


HERE = Path(__file__).parent
ADMINISTRATOR = "owner@fedbiot.org"
OWN_NETWORK = "FEDBIOT_BENCHMARK_NETWORK"  # set in the namespace
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def enter_own_network():
    """Start this script anew in a network namespace, where nothing else uses the loopback device."""
    if OWN_NETWORK in os.environ:
        return
    within = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    with suppress(FileNotFoundError):
        if subprocess.run([*within, "true"], stderr=subprocess.DEVNULL).returncode == 0:
            os.execvpe("unshare", [*within, sys.executable, *sys.argv], os.environ | {OWN_NETWORK: "1"})


def carried() -> int:
    """Bytes that the loopback device has carried."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    [loopback] = [line for line in lines if line.strip().startswith("lo:")]
    return int(loopback.split()[9])


class Watch:
    """Samples of a run: when rounds ended, what the network had carried by then, and the parties' memory."""

    def __init__(self, rounds: Path, parties: dict[str, psutil.Process]):
        self.rounds, self.parties = rounds, parties
        self.ended: list[tuple[float, int]] = []
        self.peaks = dict.fromkeys(parties, 0)

    def until(self, process: subprocess.Popen):
        sampled = 0.0
        while process.poll() is None:
            ended = len(self.rounds.read_text().splitlines()) if self.rounds.is_file() else 0
            self.ended += [(time.monotonic(), carried())] * (ended - len(self.ended))
            if time.monotonic() - sampled > 1:
                for name, party in self.parties.items():
                    self.peaks[name] = max(self.peaks[name], pss(party))
                sampled = time.monotonic()
            time.sleep(0.02)

    @property
    def seconds(self) -> list[float]:
        return [end - start for (start, _), (end, _) in pairwise(self.ended)]

    @property
    def wire(self) -> list[int]:
        return [end - start for (_, start), (_, end) in pairwise(self.ended)]

    def peak(self, is_owner: bool) -> float:
        return max(peak for name, peak in self.peaks.items() if (name == "owner") == is_owner) / 1e6


def pss(process: psutil.Process) -> int:
    """Bytes of a process and all that it has started."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().pss
    return total


def write_texts(file: Path, num_words: int, vocab_size: int, seed: int):
    generator = random.Random(seed)
    texts = (" ".join(str(generator.randrange(3, vocab_size)) for _ in range(num_words)) for _ in range(64))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def prepare(folder: Path, args) -> list[str]:
    """Write the model, the texts and the settings. Gives the sites' names."""
    size = args.hidden_size, args.num_layers, args.vocab_size, args.intermediate_size
    random_llama(*size).save_pretrained(folder / "model")
    word_tokenizer(args.vocab_size).save_pretrained(folder / "model")
    sites = [f"site-{i}" for i in range(args.sites)]
    for seed, name in enumerate(["public", *sites]):
        write_texts(folder / f"{name}.jsonl", args.num_tokens, args.vocab_size, seed)
    settings = {
        "model_name_or_path": "model", "public_dataset_name": "public.jsonl", "num_rounds": args.num_rounds,
        "local_steps": args.local_steps, "initial_alignment_steps": 5, "alignment_steps": 5, "alignment_batch_size": 4,
        "per_device_train_batch_size": args.batch_size, "report_to": "none", "use_cpu": True, "lora_r": 8, "lora_alpha": 16,
        "lora_target_modules": "all-linear", "client_zero_shot_examples": 0, "teacher_cache_dir": "cache",
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    (folder / "site.yaml").write_text(yaml.safe_dump({"use_cpu": True}))
    return sites


def start(folder: Path, name: str, *command) -> psutil.Popen:
    with (folder / f"{name}.log").open("a") as log:
        words = [str(word) for word in command]
        return psutil.Popen(words, env=ENVIRONMENT, stdout=log, stderr=log, cwd=folder, start_new_session=True)


def fedbiot(folder: Path, name: str, *words) -> psutil.Popen:
    return start(folder, name, sys.executable, "-m", "fedbiot_trainer", *words)


def finish(folder: Path, name: str, process: psutil.Popen):
    if process.wait():
        raise SystemExit(f"'{name}' failed:\n{(folder / f'{name}.log').read_text()[-4000:]}")


@contextmanager
def federation(folder: Path, sites: list[str]):
    """Startup kits, and the owner's server and the sites as they run."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    words = ["--host", "localhost", "--port", port, "--sites", *sites, "--output_dir", folder / "kits"]
    finish(folder, "provision", fedbiot(folder, "provision", "provision", *words))
    kits = folder / "kits" / "fedbiot" / "prod_00"
    parties = {"owner": start(folder, "owner", kits / "owner" / "startup" / "sub_start.sh", "--once")}
    for site in sites:
        own = ["--kit", kits / site, "--data", f"{site}.jsonl", "--config", "site.yaml"]
        parties[site] = fedbiot(folder, site, "join", *own)
    try:
        yield kits / ADMINISTRATOR, parties
    finally:
        for party in parties.values():
            for one in [*party.children(recursive=True), party]:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)


def measure_run(folder: Path, args) -> dict:
    """One row: the run in one process, then the same with sites of their own."""
    sites = prepare(folder, args)
    clients = [f"{site}={site}.jsonl" for site in sites]
    alone = fedbiot(
        folder, "alone", "train", "--config", "run.yaml", "--output_dir", "alone", "--client_datasets", *clients
    )
    one = Watch(folder / "alone" / "rounds.jsonl", {"owner": alone})
    one.until(alone)
    finish(folder, "alone", alone)
    with federation(folder, sites) as (kit, parties):
        words = ["--kit", kit, "--min_sites", len(sites), "--patience", 1200, "--config", "run.yaml"]
        served = fedbiot(folder, "serve", "serve", *words, "--output_dir", "served")
        many = Watch(folder / "served" / "rounds.jsonl", parties)
        many.until(served)
        finish(folder, "serve", served)
    records = [json.loads(line) for line in (folder / "served" / "rounds.jsonl").read_text().splitlines()]
    assert all(set(record["client_losses"]) == set(sites) for record in records), "a site has missed a round"
    payload = sum(record["bytes_down"] + record["bytes_up"] for record in records[1:]) / len(records[1:])
    wire = sum(many.wire) / len(many.wire) if OWN_NETWORK in os.environ else None
    ratios = spread(served / alone for served, alone in zip(many.seconds, one.seconds, strict=True))
    return {
        "case": f"{len(sites)} sites, hidden size {args.hidden_size}",
        "one process s / round": sum(one.seconds) / len(one.seconds),
        "deployed s / round": sum(many.seconds) / len(many.seconds),
        **ratios,
        "target": 1.1 if len(sites) == 1 else None,
        "MB payload": payload / 1e6,
        "MB loopback": None if wire is None else wire / 1e6,
        "one process peak MB": one.peak(is_owner=True),
        "owner peak MB": many.peak(is_owner=True),
        "site peak MB": many.peak(is_owner=False),
    }


def deliver(carrier, argument: str):
    """The owner's function of a job that brings a package to all sites, and does no more."""
    from fedbiot_trainer.engines.remote import RemoteClients

    pool = RemoteClients(carrier, argument)
    errors = [reply.error or "" for reply in pool.fit(dict.fromkeys(carrier.sites(), b""), None)]
    if any(error.startswith("the package") for error in errors):
        raise RuntimeError(errors)


def measure_package(folder: Path, args) -> dict:
    """One row: a package of random bytes on its way to the sites."""
    from fedbiot_trainer.engines.nvflare.administrator import open_session, wait_for_sites
    from fedbiot_trainer.engines.nvflare.job import write_job

    sites = prepare(folder, args)
    (folder / "package").mkdir()
    with (folder / "package" / "model.safetensors").open("wb") as file:
        for _ in range(round(args.package_gb * 100)):
            file.write(os.urandom(10**7))
    with federation(folder, sites) as (kit, parties):
        session = open_session(kit, timeout=300)
        assert wait_for_sites(session, sites, 300) == sites
        before = {name: pss(party) for name, party in parties.items()}
        sent, started = carried(), time.monotonic()
        job = session.submit_job(
            str(write_job(folder / "job", f"{Path(__file__).stem}:deliver", str(folder / "package")))
        )
        watch = Watch(folder / "none", parties)
        waiting = subprocess.Popen([sys.executable, "-c", WAIT_FOR_JOB, str(kit), job], env=ENVIRONMENT)
        watch.until(waiting)
        assert waiting.returncode == 0, "the package was not delivered"
        seconds = time.monotonic() - started
        session.close()
    size = args.package_gb * 1e9 * len(sites)
    ratio = (carried() - sent) / size if OWN_NETWORK in os.environ else None
    return {
        "case": f"package of {args.package_gb:g} GB to {len(sites)} sites",
        "seconds": seconds,
        "ratio_median": ratio, "ratio_min": ratio, "ratio_max": ratio, "target": None,
        "owner idle MB": before["owner"] / 1e6,
        "owner peak MB": watch.peak(is_owner=True),
        "site idle MB": max(before[site] for site in sites) / 1e6,
        "site peak MB": watch.peak(is_owner=False),
    }  # fmt: skip


WAIT_FOR_JOB = """
import sys
from fedbiot_trainer.engines.nvflare.administrator import open_session
session = open_session(sys.argv[1])
status = session.wait_for_job(sys.argv[2], timeout=3600)["status"]
session.close()
sys.exit(status != "FINISHED:COMPLETED")
"""


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--sites", type=int, default=3)
    arguments.add_argument("--num_rounds", type=int, default=6)
    arguments.add_argument("--local_steps", type=int, default=10)
    arguments.add_argument("--batch_size", type=int, default=4)
    arguments.add_argument("--num_tokens", type=int, default=150)
    arguments.add_argument("--hidden_size", type=int, default=256)
    arguments.add_argument("--intermediate_size", type=int)
    arguments.add_argument("--num_layers", type=int, default=12)
    arguments.add_argument("--vocab_size", type=int, default=4096)
    arguments.add_argument("--package_gb", type=float, help="Only bring a package of this size to the sites.")
    args = arguments.parse_args()
    if args.quick:
        args.sites, args.num_rounds, args.local_steps, args.hidden_size, args.num_layers = 2, 3, 2, 32, 6
    enter_own_network()
    folder = Path(tempfile.mkdtemp(prefix="fedbiot-deployment-"))
    try:
        row = (measure_package if args.package_gb else measure_run)(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show("A deployed run beside the run in one process", [row], args.json)


if __name__ == "__main__":
    main()
