"""
One federated run of this library against one of NVIDIA FLARE's Hugging Face plugin, `nvflare.client.hf.patch(trainer)`.

Both have the same base model, tokenized data, LoRA, optimizer, local steps and rounds, on CPU, with one thread per
process. NVFlare runs in its simulator, in an environment of its own that is made on first use (needs network, 1.6 GB).
It knows no emulator: its clients fine-tune a LoRA on all layers of the full model. Its settings are the leanest that it
has: only the LoRA is exchanged, as PyTorch tensors; the server holds no base model; clients train inside their
simulator process, start every round with a fresh optimizer as ours do, write no checkpoint, and ask for a task every
0.1 s instead of 2 s. Against it run

    same layers: nothing dropped, nothing aligned, LoRA on all layers but the lowest, the nearest there is
    FedBiOT:     beta 0.5, 2 adapter layers, 10 alignment steps in each round

NVFlare trains its clients side by side, each in a process of its own, while ours take turns. `cores` is what a system
may use: ours has one process for each, launched with Accelerate, which share every batch (DDP). With
`--nvflare_threads 1` NVFlare's clients take turns too, which starts a process for each turn.

    s / round       from the start of a round to that of the next (the last: to its end), without the first. Ours by
                    callback, NVFlare's from its server's log. Start-up is not in it.
    CPU s / round   processor time of all processes of the system in the same spans
    MB down, up     per client and round. Ours: payloads. NVFlare: all frames of a client's connections, headers and
                    polling included; the rest of the transport (TCP, TLS) counts for neither.
    MB once         what a client must have before the first round. Ours: the emulator package. NVFlare: the base model,
                    which it does not send.
    peak MB         largest sum of proportional set sizes (PSS) over all processes of the system

    python benchmarks/versus_nvflare.py --json versus_nvflare.json
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from common import parser, random_llama, show, spread, token_dataset, word_tokenizer
from transformers import TrainerCallback
from transformers.utils import logging


NVFLARE = "nvflare==2.9.0"
HERE = Path(__file__).parent
DDP = HERE.parent / "accelerate_configs" / "cpu" / "ddp.yaml"
SETTINGS = {
    "same layers": {"emulator_drop_ratio": 0.0, "alignment_steps": 0, "proximal_weight": 0.0},
    "FedBiOT": {"emulator_drop_ratio": 0.5, "alignment_steps": 10, "num_adapter_layers": 2},
}
ONCE = ("MB down", "MB up", "MB once")  # they do not depend on the cores
ALIGNMENT_BATCH = 8
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def nvflare_python(folder: Path) -> Path:
    """The interpreter of NVFlare's environment, which is made if it is not there."""
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        # torch first and pinned: an unpinned torch pulls gigabytes of CUDA packages.
        pinned = [str(python), "-m", "pip", "install", "--quiet", "-c", str(HERE.parent / "constraints.txt")]
        packages = [NVFLARE, "transformers", "trl", "peft", "accelerate", "datasets"]
        commands = [sys.executable, "-m", "venv", str(folder)], [*pinned, "torch"], [*pinned, *packages]
        print(f"Installing {NVFLARE} in '{folder}', once.", flush=True)
        for command in commands:
            if subprocess.run(command).returncode:
                lines = "\n".join(f"  {' '.join(command)}" for command in commands)
                raise SystemExit(
                    f"{NVFLARE} could not be installed, so there is nothing to compare with. By hand:\n{lines}\n"
                    f"  touch {done}"
                )
        done.touch()
    return python


def prepare(folder: Path, args) -> dict:
    """Save the model, each client's data and the settings that both systems read."""
    random_llama(args.hidden_size, args.num_layers, args.vocab_size).save_pretrained(folder / "model")
    word_tokenizer(args.vocab_size).save_pretrained(folder / "model")
    clients = [f"client-{i}" for i in range(args.num_clients)]
    for seed, name in enumerate(["public", *clients]):
        token_dataset(200, args.num_tokens, args.vocab_size, seed).save_to_disk(folder / "data" / name)
    settings = {
        "clients": clients,
        "num_rounds": args.num_rounds,
        "local_steps": args.local_steps,
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        "training": {
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": 5e-4,
            "lr_scheduler_type": "constant",
            "adam_beta2": 0.95,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        },
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


class RoundStarts(TrainerCallback):
    """When each round started, and when the last one ended."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.times.append(time.time())

    def on_train_end(self, args, state, control, **kwargs):
        self.times.append(time.time())


def run_ours(folder: Path, setting: str):
    """One run of this library, in this process or those of the launcher. Its figures go to `folder / "ours.json"`."""
    from datasets import load_from_disk
    from peft import LoraConfig

    from fedbiot_trainer import FedBiOTConfig, FederatedRunner

    settings = json.loads((folder / "settings.json").read_text())
    settings["training"]["per_device_train_batch_size"] //= NUM_PROCESSES
    base_layers = json.loads((folder / "model" / "config.json").read_text())["num_hidden_layers"]
    config = FedBiOTConfig(
        str(folder / "out"),
        num_rounds=settings["num_rounds"],
        local_steps=settings["local_steps"],
        initial_alignment_steps=0,
        alignment_batch_size=ALIGNMENT_BATCH // NUM_PROCESSES,
        teacher_cache_dir=str(folder / "out" / "cache"),
        log_level="error",
        **settings["training"],
        **{"num_adapter_layers": base_layers - 1, **SETTINGS[setting]},
    )
    clock = RoundStarts()
    runner = FederatedRunner(
        str(folder / "model"),
        config,
        {name: load_from_disk(folder / "data" / name) for name in settings["clients"]},
        public_dataset=load_from_disk(folder / "data" / "public") if config.aligns else None,
        peft_config=LoraConfig(**settings["lora"]),
        callbacks=[clock],
    )
    sizes = runner.train().bytes
    turns = settings["num_rounds"] * len(settings["clients"])
    sizes = {"down": sizes["down"] / turns, "up": sizes["up"] / turns, "once": sizes["once_per_client"]}
    if config.process_index == 0:
        (folder / "ours.json").write_text(json.dumps({"starts": clock.times, **sizes}))


def usage(process: psutil.Process) -> dict[int, tuple[float, int]]:
    """CPU seconds and proportional set size (bytes) of a process and all that it has started, by process id."""
    used = {}
    with suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                used[one.pid] = (times.user + times.system, one.memory_full_info().pss)
    return used


def watch(command: list, cores: int, log: Path) -> list[tuple[float, float, int]]:
    """Run a command on so many cores. Samples of the time, the CPU seconds so far and the PSS of all its processes."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    command, seconds, samples = [str(word) for word in command], {}, []
    with open(log, "w") as output:
        process = psutil.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        while process.poll() is None:
            used = usage(process)
            seconds |= {pid: cpu for pid, (cpu, _) in used.items()}  # those that have ended count on
            samples.append((time.time(), sum(seconds.values()), sum(pss for _, pss in used.values())))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed:\n{log.read_text()[-4000:]}")
    return samples


def figures(
    samples: list, starts: list[float], down: float | None, up: float | None, once: float
) -> dict[str, list[float]]:
    """The measures of one run: for times one value for each round after the first, else one."""
    times, seconds, pss = zip(*samples, strict=True)
    used = np.interp(starts, times, seconds).tolist()
    sizes = {"MB down": down, "MB up": up, "MB once": once, "peak MB": max(pss)}
    return {
        "s / round": [end - start for start, end in pairwise(starts[1:])],
        "CPU s / round": [end - start for start, end in pairwise(used[1:])],
        **{name: [size / 1e6] for name, size in sizes.items() if size is not None},
    }


def measure_ours(folder: Path, setting: str, cores: int) -> dict[str, list[float]]:
    shutil.rmtree(folder / "out", ignore_errors=True)  # no run finds what another has computed
    command = [sys.executable]
    if cores > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", DDP, "--num_processes", cores]
        command += ["--main_process_port", 0]
    samples = watch([*command, __file__, "--run", setting, "--folder", folder], cores, folder / "ours.log")
    return figures(samples, **json.loads((folder / "ours.json").read_text()))


def measure_nvflare(folder: Path, python: Path, settings: dict, cores: int, threads: int) -> dict[str, list[float]]:
    # As `SimEnv` starts it, without the process of the script that uses `SimEnv`.
    command = [python, "-m", "nvflare.private.fed.app.simulator.simulator", folder / "job", "-w", folder / "workspace"]
    command += ["-c", ",".join(settings["clients"]), "-t", threads]
    notes = {name: folder / f"{name}.jsonl" for name in settings["clients"]}
    for file in notes.values():
        file.unlink(missing_ok=True)
    samples = watch(command, cores, folder / "nvflare.log")

    log = (folder / "workspace" / "server" / "log.json").read_text().splitlines()
    starts = [
        datetime.strptime(record["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        for record in map(json.loads, log)
        if record["name"] == "FedAvg" and any(end in record["message"] for end in (" started.", "Finished FedAvg."))
    ]
    if len(starts) != settings["num_rounds"] + 1:
        raise SystemExit(f"NVFlare did not finish its rounds:\n{(folder / 'nvflare.log').read_text()[-4000:]}")
    down = up = None
    if threads == len(settings["clients"]):  # else a process, and so its count, ends with each round
        # From one arrival of a round's model to the next, each client sends and receives once.
        counts = [[json.loads(line) for line in file.read_text().splitlines()] for file in notes.values()]
        down, up = (
            statistics.median(after[way] - before[way] for client in counts for before, after in pairwise(client))
            for way in ("received", "sent")
        )
    once = (folder / "model" / "model.safetensors").stat().st_size
    return figures(samples, starts, down, up, once)


def row(setting: str, cores: int, measure: str, args, ours: list[list[float]], theirs: list[list[float]]) -> dict:
    """A row: medians and extremes over all rounds, and the ratio of the medians of each pair of runs."""

    def columns(name: str, runs: list[list[float]]) -> dict:
        values = [value for run in runs for value in run]
        low, high = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (min(values), max(values)))
        return {name: statistics.median(values), f"{name}_spread": None if low == high else f"{low} - {high}"}

    ratios = [statistics.median(one) / statistics.median(other) for one, other in zip(ours, theirs, strict=True)]
    names = ("hidden_size", "num_layers", "num_clients", "local_steps")
    sizes = {name: getattr(args, name) for name in names}
    head = {"setting": setting, "cores": cores, "measure": measure, **sizes}
    return {**head, **columns("ours", ours), **columns("nvflare", theirs), **spread(ratios), "target": 1.0}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--hidden_size", type=int, default=256)
    arguments.add_argument("--num_layers", type=int, default=12)
    arguments.add_argument("--vocab_size", type=int, default=4096)
    arguments.add_argument("--num_tokens", type=int, default=150, help="Tokens per example.")
    arguments.add_argument("--batch_size", type=int, default=4)
    arguments.add_argument("--num_clients", type=int, default=3)
    arguments.add_argument("--num_rounds", type=int, default=5)
    arguments.add_argument("--local_steps", type=int, default=10)
    arguments.add_argument("--repetitions", type=int, default=3, help="Runs of each system, in turn.")
    arguments.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="Cores that a system may use.")
    arguments.add_argument("--nvflare_threads", type=int, help="NVFlare's clients at a time. Defaults to all.")
    arguments.add_argument("--nvflare_env", type=Path, default=Path("~/.cache/fedbiot-trainer/nvflare-venv"))
    arguments.add_argument("--run", choices=SETTINGS, help="Only this run of ours, in this process.")
    arguments.add_argument("--folder", type=Path, help="What `--run` reads and writes.")
    args = arguments.parse_args()
    if args.run:
        run_ours(args.folder, args.run)
        return
    for name, size in (("batch_size", args.batch_size), ("the alignment's batch", ALIGNMENT_BATCH)):
        if any(size % cores for cores in args.cores):
            arguments.error(f"{name} is {size}, which {args.cores} cores cannot share evenly: the work would differ.")
    logging.disable_progress_bar()
    python = nvflare_python(args.nvflare_env.expanduser())
    if args.quick:
        args.hidden_size, args.num_layers, args.vocab_size, args.num_tokens = 64, 4, 512, 32
        args.num_clients, args.num_rounds, args.local_steps, args.repetitions, args.cores = 1, 2, 2, 1, [2]

    threads = args.nvflare_threads or args.num_clients
    systems = ["NVFlare", *SETTINGS][:: 2 if args.quick else 1]
    results = {(system, cores): [] for cores in args.cores for system in systems}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = prepare(folder, args)
        watch([python, HERE / "nvflare_client.py", "export", folder], 1, folder / "export.log")
        for _ in range(args.repetitions):
            for (system, cores), runs in results.items():
                if system == "NVFlare":
                    runs.append(measure_nvflare(folder, python, settings, cores, threads))
                else:
                    runs.append(measure_ours(folder, system, cores))
    rows = []
    for (system, cores), runs in results.items():
        if system != "NVFlare":
            for measure in results["NVFlare", cores][0]:
                if cores == args.cores[0] or measure not in ONCE:
                    pair = ([run[measure] for run in one] for one in (runs, results["NVFlare", cores]))
                    rows.append(row(system, cores, measure, args, *pair))
    show(f"A federated run of ours against {NVFLARE}", rows, args.json)


if __name__ == "__main__":
    main()
