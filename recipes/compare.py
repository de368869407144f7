r"""
The paper's comparison on one task: methods x drop ratios (beta) x seeds, as a table with error bars and a figure.

    python recipes/compare.py --task demo --output_dir outputs/compare-demo

Each cell is one run of fedbiot_sft.py in a process of its own, with a folder of its own in `output_dir`. A comparison
that was interrupted goes on where it was, within a cell too, when the same command is given again. All other flags go to fedbiot_sft.py:

    python recipes/compare.py --config recipes/gsm8k/llama2_7b.yaml --output_dir out --num_rounds 100 \
        --launcher "accelerate launch --config_file accelerate_configs/multi_gpu.yaml"

DDP or ZeRO-2 can run it. ZeRO-3 can run neither adapter layers at both ends nor, without --no-drift, FedBiOT; DeepSpeed
cannot run the clients alone.

Leaves `results.json` (one object per cell), `rows.json` (the same, only the scores), `table.md` and `comparison.png`,
with --ablation also `ablation.png`.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from fedbiot_trainer import METHODS, FedBiOTConfig
from fedbiot_trainer.config.methods import ABLATION, COMPARISON, WITHOUT_EMULATOR
from fedbiot_trainer.federation.costs import SETTINGS, plan
from fedbiot_trainer.output.figures import COLORS
from fedbiot_trainer.output.tables import format_bytes
from fedbiot_trainer.shared.records import RoundRecord, RunSummary


RECIPES = Path(__file__).parent
TASKS = {
    "demo": "demo/demo.yaml",
    "gsm8k": "gsm8k/cpu.yaml",
    "code": "code/cpu.yaml",
    **{f"smollm2-{task}": f"smollm2/{task}.yaml" for task in ("svamp", "xquad", "medquad", "gsm8k", "code")},
}
PLAIN = {"highlight": False, "soft_wrap": True, "markup": False}
NO_FLOPS = {"client_flops": 0, "server_flops": 0}
OWN = {
    "--method": "Choose with `--methods`.",
    "--emulator_drop_ratio": "Choose with `--betas`.",
    "--seed": "Choose with `--seeds`.",
    "--eval_drift": "Choose with `--drift` or `--no-drift`.",
    "--resume_from_checkpoint": "Cells that were interrupted go on by themselves.",
    "--overwrite_output_dir": "Delete a cell's folder to have it made again.",
    "--plan_only": "Each has to run: plan with recipes/fedbiot_sft.py.",
}
DRIFT = ("fedbiot", "fedbiot_align_once")  # what per-round alignment does to the emulator is measured in these


@dataclass(frozen=True)
class Cell:
    """One run: a method at a drop ratio (`None` where there is no emulator) with a seed."""

    method: str
    beta: float | None
    seed: int

    def __str__(self) -> str:
        return "-".join([self.method, *([f"beta{self.beta}"] if self.beta is not None else []), f"seed{self.seed}"])


def make_cells(args: argparse.Namespace) -> list[Cell]:
    """All cells, seed by seed, so that an early look shows every method."""
    cells = []
    for seed in args.seeds:
        for method in args.methods:
            betas = [None] if method in WITHOUT_EMULATOR else args.betas
            cells += [Cell(method, beta, seed) for beta in betas]
        if args.ablation:
            cells += [Cell(method, args.betas[-1], seed) for method in ABLATION if method not in args.methods]
    return list(dict.fromkeys(cells))


def command(cell: Cell, args: argparse.Namespace, flags: list[str]) -> list[str]:
    """The command line of a cell's run."""
    settings = {"method": cell.method, "seed": cell.seed, "output_dir": args.output_dir / str(cell)}
    if cell.beta is not None:
        settings["emulator_drop_ratio"] = cell.beta
    if cell.method in DRIFT and args.drift:
        settings["eval_drift"] = True
    pairs = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    # A cell that was interrupted goes on from its state; what has none begins anew.
    begun = any((args.output_dir / str(cell)).glob("**/state/*.safetensors"))
    how = "--resume_from_checkpoint" if begun else "--overwrite_output_dir"
    recipe = [str(RECIPES / "fedbiot_sft.py"), "--config", str(args.config), how, "true"]
    return [*shlex.split(args.launcher), *recipe, *pairs, *flags]


def is_done(cell: Cell, args: argparse.Namespace, flags: list[str]) -> bool:
    """
    Whether the cell's result is there.

    Raises:
        ValueError: If another command made it.
    """
    file = args.output_dir / str(cell) / "cell.json"
    if not file.is_file():
        return False
    made, now = json.loads(file.read_text()), made_with(cell, args, flags)
    if made != now:
        changed = sorted(name for name in made | now if made.get(name) != now.get(name))
        told = ", ".join(f"{name} was {made.get(name)!r:.200}" for name in changed)
        raise ValueError(
            f"`output_dir` is '{args.output_dir}', in which {cell} was made with other settings ({told}). Choose another folder, "
            "or delete that one."
        )
    return True


def made_with(cell: Cell, args: argparse.Namespace, flags: list[str]) -> dict:
    """
    What makes a cell's result besides its method, drop ratio and seed: the recipe's settings, the flags, how it is launched, and
    the files that these name.
    """
    settings = yaml.safe_load(args.config.read_text())
    words = [*settings.values(), *flags]
    words += [word for words_of in settings.values() if isinstance(words_of, list) for word in words_of]
    parts = {part for word in words if isinstance(word, str) for part in (word, word.rpartition("=")[2])}
    files = {part: digest_of(part, os.stat(part).st_mtime_ns) for part in sorted(parts) if os.path.isfile(part)}
    made = {"flags": flags, "launcher": args.launcher, "drift": cell.method in DRIFT and args.drift, "files": files}
    return {f"`{name}` in the YAML": value for name, value in settings.items()} | made


@cache
def digest_of(file: str, time_ns: int) -> str:
    """Of a file as it was written then."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def run_cell(cell: Cell, args: argparse.Namespace, flags: list[str], running: set[subprocess.Popen]) -> str | None:
    """Run a cell. Returns what went wrong, if anything did."""
    folder, made = args.output_dir / str(cell), made_with(cell, args, flags)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs)), **os.environ}
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen(
            command(cell, args, flags), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process,
    ):
        running.add(process)
    running.discard(process)
    if process.returncode != 0:
        last_lines = "\n".join((folder / "log.txt").read_text().splitlines()[-5:])
        code = process.returncode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else "failed"
        return f"{cell} {how} ({folder / 'log.txt'}):\n{last_lines}"
    if RunSummary.read(folder / "summary.json").adap_fu is None:
        return f"{cell} has evaluated nothing: give the runs held-out text with `--eval_dataset_name`."
    (folder / "cell.json").write_text(json.dumps(made) + "\n")
    return None


def run_cells(cells: list[Cell], args: argparse.Namespace, flags: list[str], console: Console) -> list[str]:
    """Run what is not done, `args.jobs` at a time. Returns what went wrong."""
    waiting = [cell for cell in cells if not is_done(cell, args, flags)]
    console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} done before", **PLAIN)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    errors, running, started = [], set(), time.perf_counter()
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        whole = progress.add_task("cells", total=len(waiting))
        futures = {pool.submit(run_cell, cell, args, flags, running): cell for cell in waiting}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                progress.advance(whole)
                left = (time.perf_counter() - started) / done * (len(waiting) - done)
                error = future.result()
                if error is not None:
                    errors.append(error)
                line = "failed" if error else _headline(read_cell(futures[future], args))
                console.print(f"{done}/{len(waiting)} {futures[future]}: {line} | ETA {left / 60:.0f} min", **PLAIN)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                os.killpg(process.pid, signal.SIGTERM)  # with what a launcher started
            raise
    return errors


def _headline(result: dict) -> str:
    parts = [(name, result[key]) for name, key in (("AdapEmu", "adap_emu"), ("AdapFu", "adap_fu"))]
    shown = [f"{name} {_score(values)[0]} {_score(values)[1]:.4g}" for name, values in parts if values]
    return ", ".join([*shown, f"{result['seconds']:.0f} s"])


def _score(values: dict[str, float]) -> tuple[str, float]:
    """The task's own metric, else the loss."""
    name = next((name for name in values if name not in ("loss", "token_accuracy")), "loss")
    return name, values[name]


def read_cell(cell: Cell, args: argparse.Namespace) -> dict:
    """A cell's result and costs; FLOPs are counted from the model's config, at the texts' mean length."""
    folder = args.output_dir / str(cell)
    summary = RunSummary.read(folder / "summary.json")
    first = next(iter(summary.clients or {"": None}))
    rounds = RoundRecord.read_all(folder / first / "rounds.jsonl")
    trains = summary.rounds > 0
    sent = sum(len(record.answered) for record in rounds) if trains else 0
    num_clients = 1 if summary.clients else len(summary.num_examples)
    return {
        "task": args.task,
        "method": cell.method,
        "beta": cell.beta,
        "seed": cell.seed,
        "zero_shot": summary.zero_shot,
        "adap_emu": summary.adap_emu if cell.method not in WITHOUT_EMULATOR else None,
        "adap_fu": summary.adap_fu,
        "trainable_parameters": summary.parameters.trainable_client if trains else 0,
        "client_share": summary.parameters.client_share,
        "bytes_per_client_round": (summary.bytes["down"] + summary.bytes["up"]) / sent if sent else 0,
        **(_flops(summary, folder / first, sent / num_clients) if trains else NO_FLOPS),
        "seconds": summary.seconds["total"],
        "drift": [
            {name: getattr(record, name) for name in ("server_round", "drift_l2", "drift_kl")} for record in rounds
        ]
        if cell.method in DRIFT and args.drift
        else [],
    }


def _flops(summary: RunSummary, folder: Path, rounds_of_a_client: float) -> dict[str, float | None]:
    """FLOPs of one client and of the server in the whole run; `None` for a model that cannot be planned."""
    settings, lengths = summary.settings, summary.tokens_per_example
    lora = {name: summary.peft_config[name] for name in ("r", "lora_alpha", "target_modules")}
    base = json.loads((folder / "client_lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    names = (*SETTINGS, "teacher", "alignment_init", "alignment_init_tokens", "trust_remote_code")
    known = {name: settings[name] for name in names if settings.get(name) is not None}

    def costs(length):
        planned = json.dumps({**known, "max_length": max(2, round(length))}, sort_keys=True)
        return _plan(base, planned, json.dumps(lora), summary.num_public_examples or 1)

    try:
        client = costs(lengths["clients"])["clients"]["fedbiot"]["flops_per_round"] * rounds_of_a_client
        server = 0
        if lengths["public"] is not None:
            align = costs(lengths["public"])["server"][settings["teacher"]]
            steps = settings["initial_alignment_steps"] + summary.rounds * settings["alignment_steps"]
            once = ("flops_to_store", "flops_to_start", "flops_to_plug_in")
            server = align["flops_per_step"] * steps + sum(align[name] for name in once)
    except (OSError, ValueError) as error:
        warnings.warn(f"FLOPs cannot be counted: {error}", stacklevel=2)
        return {"client_flops": None, "server_flops": None}
    return {"client_flops": client, "server_flops": server}


@cache
def _plan(base: str, settings: str, lora: str, public_examples: int) -> dict[str, dict]:
    """Seconds for each cell, and the same for all seeds."""
    args = FedBiOTConfig(**json.loads(settings), use_cpu=True)
    return plan(base, args, LoraConfig(**json.loads(lora)), public_examples=public_examples)


def aggregate(results: list[dict]) -> list[dict]:
    """One row per method and beta: mean and standard deviation over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["method"], result["beta"]), []).append(result)
    rows = []
    for (method, beta), cells in groups.items():
        row = {"method": method, "beta": beta, "num_seeds": len(cells)}
        for key in ("adap_emu", "adap_fu"):
            if cells[0][key] is not None:
                row[key] = {name: spread([cell[key][name] for cell in cells]) for name in cells[0][key]}
        row["gain"] = {
            name: mean(cell["adap_fu"][name] - cell["zero_shot"][name] for cell in cells)
            for name in cells[0]["adap_fu"]
        }
        for name in ("trainable_parameters", "bytes_per_client_round", "client_flops", "server_flops", "seconds"):
            row[name] = None if cells[0][name] is None else mean(cell[name] for cell in cells)
        rows.append(row)
    return rows


def rows_of_scores(results: list[dict]) -> list[dict]:
    """The cells' results in one form for every task: `loss` and `metric`, the task's own; `None` where there is none."""

    def scores(values):
        if values is None:
            return None
        name, value = _score(values)
        return {"loss": values["loss"], "metric": None if name == "loss" else value}

    return [
        {
            "task": result["task"],
            "method": {"local_only": "alone"}.get(result["method"], result["method"]),
            "beta": result["beta"],
            "seed": result["seed"],
            "zero_shot": scores(result["zero_shot"]),
            "adap_emu": scores(result["adap_emu"]),
            "adap_fu": scores(result["adap_fu"]) if result["method"] != "zero_shot" else None,
        }
        for result in results
    ]


def gain_recovered(row: dict, rows: list[dict], metric: str) -> float | None:
    """
    The share of what LoRA on the full model gains over zero-shot that AdapFu of `row` gains, in means over the seeds.

    Returns:
        `float`, *optional*: 0 is zero-shot, 1 is LoRA on the full model. `None` if that was not run or gained nothing.
    """
    most = next((other["gain"][metric] for other in rows if other["method"] == "full_lora"), 0.0)
    gains = most > 0 if metric != "loss" else most < 0
    return row["gain"][metric] / most if gains else None


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single value)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def table_cells(rows: list[dict]) -> list[list[str]]:
    """The rows as lines of a table, its header first."""
    metrics = [name for name in rows[0]["adap_fu"] if name != "token_accuracy"]
    names = [f"{who} {metric.replace('_', ' ')}" for metric in metrics for who in ("AdapEmu", "AdapFu")]
    recovered = [m for m in metrics if any(gain_recovered(row, rows, m) is not None for row in rows)]
    names += [f"gain recovered ({metric.replace('_', ' ')})" for metric in recovered]
    header = ["method", "beta", "seeds", *names, "trained", "bytes/round", "client TFLOPs", "server TFLOPs", "s"]
    lines = [header]
    for row in rows:
        scores = [_cell(row, key, metric) for metric in metrics for key in ("adap_emu", "adap_fu")]
        scores += [f"{gain_recovered(row, rows, metric):z.0%}" for metric in recovered]
        flops = [row[name] for name in ("client_flops", "server_flops")]
        flops = ["" if value is None else f"{value / 1e12:.3g}" for value in flops]
        costs = f"{row['trainable_parameters']:,.0f}", format_bytes(row["bytes_per_client_round"]), *flops
        beta = "" if row["beta"] is None else str(row["beta"])
        lines.append([row["method"], beta, str(row["num_seeds"]), *scores, *costs, f"{row['seconds']:.0f}"])
    return lines


def _cell(row: dict, key: str, metric: str) -> str:
    if key not in row:
        return ""
    average, deviation = row[key][metric]
    scale, digits = (1, 3) if metric == "loss" else (100, 1)
    shown = f"{scale * average:.{digits}f}"
    return shown if row["num_seeds"] == 1 else f"{shown} ± {scale * deviation:.{digits}f}"


def report(results: list[dict], folder: Path, console: Console):
    """Write and show the cells' results, the table of their means and the figures."""
    rows = aggregate(results)
    header, *body = table_cells(rows)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    for name, content in (("results", results), ("rows", rows_of_scores(results))):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    plot_comparison(rows, results, folder / "comparison.png")
    if any(row["method"] in ABLATION for row in rows):
        plot_ablation(rows, folder / "ablation.png")
    columns = [Column(name, justify="right" if i else "left", no_wrap=i == 0) for i, name in enumerate(header)]
    table = Table(*columns, show_edge=False)
    for line in body:
        table.add_row(*line)
    console.width = max(console.width, 150)
    console.print(table)
    console.print(f"results in {folder}", **PLAIN)


def plot_comparison(rows: list[dict], results: list[dict], file: Path):
    """
    AdapEmu and AdapFu of each method; AdapFu against a client's FLOPs, and against AdapEmu; where it was measured, the
    emulator's drift over the rounds.
    """
    metric, _ = _score({name: values[0] for name, values in rows[0]["adap_fu"].items()})
    label = metric.replace("_", " ") if metric != "loss" else "loss (nats per token)"
    rows = [row for row in rows if row["method"] not in ABLATION] or rows
    one_beta = len({row["beta"] for row in rows} - {None}) == 1
    trained = [row for row in rows if row["client_flops"]]
    drifts = any(result["drift"] for result in results)
    figure = Figure(figsize=(13.5 + 4 * drifts, 4.4), layout="constrained")
    bars, costs, protection, *drift = figure.subplots(1, 3 + drifts, width_ratios=[1.5, 1, 1, 1][: 3 + drifts])
    _bars(bars, rows, metric, label, one_beta)
    for marker, row in zip("osD^vP*Xhd<>" * 3, trained, strict=False):
        average, deviation = row["adap_fu"][metric]
        style = {"marker": marker, "capsize": 3, "label": _name(row, one_beta), "ls": ""}
        [line, *_] = costs.errorbar(row["client_flops"] / 1e12, average, deviation, **style).lines
        if "adap_emu" in row:
            emulator, deviation_too = row["adap_emu"][metric]
            style |= {"color": line.get_color()}
            protection.errorbar(emulator, average, deviation, deviation_too, **style)
    costs.set(title="AdapFu against a client's work", xlabel="TFLOPs of a client", ylabel=label, xscale="log")
    costs.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    costs.xaxis.set_major_formatter("{x:g}")
    costs.xaxis.set_minor_formatter(NullFormatter())
    both = [row for row in trained if "adap_emu" in row]
    if both:  # where clients get as much
        protection.axline([both[0]["adap_emu"][metric][0]] * 2, slope=1, color="gray", linewidth=0.8, linestyle="--")
        if metric != "loss":
            most = 1.15 * max(row[who][metric][0] for row in both for who in ("adap_emu", "adap_fu"))
            protection.set(xlim=(0, most or 1), ylim=(0, most or 1))
    protection.set(title="What the owner gets, and clients", xlabel=f"AdapEmu: {label}", ylabel=f"AdapFu: {label}")
    if trained:
        costs.legend(frameon=False, fontsize=7)
    if drifts:
        _drift(drift[0], results)
    _save(figure, (bars, costs, protection, *drift), file)


def _drift(axes, results: list[dict]):
    """The emulator's distance from the full model, over the rounds."""
    for method, style in zip(DRIFT, ("-", "--"), strict=True):
        for beta in sorted({r["beta"] for r in results if r["method"] == method}):
            runs = [r["drift"] for r in results if (r["method"], r["beta"]) == (method, beta)]
            by_round: dict[int, list[float]] = {}
            for record in (record for run in runs for record in run if record["drift_kl"] is not None):
                by_round.setdefault(record["server_round"], []).append(record["drift_kl"])
            if not by_round:
                continue
            name = "aligned in each round" if method == "fedbiot" else "aligned once"
            color = COLORS["adap_fu"] if beta == max(r["beta"] or 0 for r in results) else COLORS["adap_emu"]
            means = [mean(values) for values in by_round.values()]
            axes.plot(
                list(by_round), means, style, marker="o", markersize=3, color=color, label=f"{name}, beta {beta}"
            )
    axes.set(title="Drift on private text", xlabel="round", ylabel="KL from the full model (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False, fontsize=8)
    axes.set_ylim(bottom=0)


def plot_ablation(rows: list[dict], file: Path):
    """FedBiOT with one factor changed at a time."""
    metric, _ = _score({name: values[0] for name, values in rows[0]["adap_fu"].items()})
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    beta = max(row["beta"] for row in rows if row["method"] in ABLATION)
    chosen = [row for row in rows if row["method"] in ("fedbiot", *ABLATION) and row["beta"] == beta]
    label = metric.replace("_", " ") if metric != "loss" else "loss (nats per token)"
    _bars(axes, chosen, metric, label, one_beta=True)
    _save(figure, (axes,), file)


def _name(row: dict, one_beta: bool) -> str:
    return row["method"].replace("_", " ") + ("" if one_beta or row["beta"] is None else f" ({row['beta']})")


def _bars(axes, rows: list[dict], metric: str, label: str, one_beta: bool):
    for offset, key, name in ((-0.2, "adap_emu", "AdapEmu"), (0.2, "adap_fu", "AdapFu")):
        points = [(i + offset, *row[key][metric]) for i, row in enumerate(rows) if key in row]
        if not points:
            continue
        places, averages, deviations = zip(*points, strict=True)
        axes.bar(places, averages, 0.4, yerr=deviations, capsize=3, color=COLORS[key], label=name)
    axes.set_xticks(range(len(rows)), [_name(row, one_beta) for row in rows], rotation=35, ha="right", fontsize=8)
    axes.set_ylabel(label)
    axes.set_title("Held-out private text", loc="left", fontweight="bold")
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.99), borderpad=0)


def _save(figure: Figure, all_axes: tuple, file: Path):
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.title.set_fontweight("bold")
    figure.savefig(file, dpi=150)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--task", choices=list(TASKS), help="A task at CPU size.")
    task.add_argument("--config", type=Path, help="YAML of any other recipe for fedbiot_sft.py.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(COMPARISON), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--betas", nargs="+", type=float, default=[0.2, 0.5], help="Drop ratios of the emulator.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablation", action="store_true", help="Also change one factor of FedBiOT at a time.")
    parser.add_argument(
        "--drift",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Measure the emulator's drift on private text.",
    )
    parser.add_argument("--jobs", type=int, default=1, help="Cells to run at a time.")
    parser.add_argument("--report_only", action="store_true", help="Run nothing: report the cells that are done.")
    parser.add_argument("--launcher", default=sys.executable, help="What runs the recipe.")
    args, flags = parser.parse_known_args(argv)
    if args.jobs < 1:
        parser.error(f"`--jobs` is {args.jobs}, but at least 1 cell must run at a time.")
    if not all(0 <= beta < 1 for beta in args.betas):
        parser.error(f"`--betas` is {args.betas}, but shares of layers to drop must be in [0, 1).")
    for flag in {flag.partition("=")[0] for flag in flags} & OWN.keys():
        parser.error(f"`{flag}` is set by the comparison in each cell. {OWN[flag]}")
    args.config = args.config or RECIPES / TASKS[args.task]
    known = {(RECIPES / file).resolve(): task for task, file in TASKS.items()}
    args.task = args.task or known.get(args.config.resolve(), args.config.parent.name)
    if not args.config.is_file():
        parser.error(f"`--config` is '{args.config}', but there is no such file.")
    return args, flags


def main(argv: list[str] | None = None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave no run behind
    args, flags = parse_args(sys.argv[1:] if argv is None else argv)
    console, cells = Console(), make_cells(args)
    try:
        errors = [] if args.report_only else run_cells(cells, args, flags, console)
    except ValueError as error:
        sys.exit(f"compare.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on from here.")
    results = [read_cell(cell, args) for cell in cells if is_done(cell, args, flags)]
    if results:
        report(results, args.output_dir, console)
    if errors:
        sys.exit("\n\n".join(errors))


if __name__ == "__main__":
    # Deprecations inside the libraries are not for the reader of this recipe's output.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    main()
