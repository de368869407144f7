"""
What each setting is worth on a task of this recipe: FedBiOT with one factor changed at a time, over several seeds.

    python recipes/smollm2/ablations.py --task svamp --output_dir outputs/ablations-svamp

Each arm is a comparison of one method, `recipes/compare.py --methods fedbiot`, in a folder of its own in `output_dir`:
what is done stays, and the same command goes on where it was. All other flags go to compare.py and on to the runs.

Leaves `ablations.json` (one object for each arm and seed), `ablations.md` and `ablations.png`. A difference is that of
runs with the same seed: clients, batches and public text are the same on both sides where the arm does not change them.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from statistics import mean

import yaml
from matplotlib.figure import Figure


RECIPES = Path(__file__).parents[1]
compare = runpy.run_path(str(RECIPES / "compare.py"))
spread = compare["spread"]

BASE = "base"
SCALES = ("0.25", "0.5", "0.75", "1", "1.25", "1.5")


def arms(task: str) -> dict[str, list[str]]:
    """The flags of each arm, beside those of the recipe's YAML."""
    settings = yaml.safe_load((RECIPES / "smollm2" / f"{task}.yaml").read_text())
    steps, rounds = settings["local_steps"], settings["num_rounds"]
    public = {"far": "far", "template alone": "template", "domain alone": "domain", "generated": "generated"}
    if task == "code":  # whose far text has the clients' form
        public = {"far": "far", "generated": "generated"}
    files = {f"public text: {name}": f"outputs/smollm2/{task}/{file}.jsonl" for name, file in public.items()}
    one = {
        **{name: ("public_dataset_name", file) for name, file in files.items()},
        "start from zero": ("alignment_init", "zero"),
        "computed start alone": ("initial_alignment_steps", 0),
        "computed start, 500 steps": ("initial_alignment_steps", 500),
        "no alignment in rounds": ("alignment_steps", 0),
        "20 steps in each round": ("alignment_steps", 20),
        "alignment learning rate 2e-4": ("alignment_learning_rate", 2e-4),
        "alignment learning rate 2e-3": ("alignment_learning_rate", 2e-3),
        "no KL": ("alignment_kl_weight", 0),
        "emulator LoRA of rank 8": ("emulator_lora_r", 8),
        "emulator LoRA of rank 128": ("emulator_lora_r", 128),
        "no proximal term": ("proximal_weight", 0),
        "proximal weight 0.01": ("proximal_weight", 0.01),
        "learning rate 2e-4": ("learning_rate", 2e-4),
        "learning rate 1e-3": ("learning_rate", 1e-3),
        "learning rate 2e-3": ("learning_rate", 2e-3),
        "twice the rounds": ("num_rounds", 2 * rounds),
        "a plug-in that learns, 40 steps": ("plug_in_steps", 40),
    }
    here = settings.get("num_adapter_layers_bottom", 0), settings["num_adapter_layers"]
    places = {f"{n} adapter layers on top": (0, n) for n in (2, 4, 6)} | {"3 adapter layers at each end": (3, 3)}
    return {
        BASE: [],
        **{name: [f"--{flag}", str(value)] for name, (flag, value) in one.items()},
        "start from zero, 500 steps": ["--alignment_init", "zero", "--initial_alignment_steps", "500"],
        "half the local steps, twice the rounds": ["--local_steps", f"{steps // 2}", "--num_rounds", f"{2 * rounds}"],
        "twice the local steps, half the rounds": ["--local_steps", f"{2 * steps}", "--num_rounds", f"{rounds // 2}"],
        "client LoRA of rank 32": ["--lora_r", "32", "--lora_alpha", "64"],
        "best plug-in scale": ["--plug_in_scales", *SCALES],
        **{
            name: ["--num_adapter_layers_bottom", f"{bottom}", "--num_adapter_layers", f"{top}"]
            for name, (bottom, top) in places.items()
            if (bottom, top) != here
        },
    }


def folder_of(name: str) -> str:
    """Of an arm, in `output_dir`."""
    return "".join(char if char.isalnum() or char in ".-" else "_" for char in name)


def run(name: str, args: argparse.Namespace, flags: list[str]) -> list[dict]:
    """The arm's results, one for each seed."""
    folder = args.output_dir / folder_of(name)
    own = ["--task", f"smollm2-{args.task}", "--methods", "fedbiot", "--betas", args.beta, "--seeds", *args.seeds]
    own += ["--no-drift", "--output_dir", folder]
    try:
        compare["main"]([*map(str, own), *flags, *arms(args.task)[name]])
    except SystemExit as error:
        sys.exit(f"The arm '{name}' was not finished, the same command goes on from here: {error}")
    return [{"arm": name, **row} for row in json.loads((folder / "rows.json").read_text())]


def against_base(rows: list[dict]) -> dict[str, list[float]]:
    """How much higher AdapFu's loss is in each arm than in the base with the same seed."""
    base = {row["seed"]: row["adap_fu"]["loss"] for row in rows if row["arm"] == BASE}
    changes: dict[str, list[float]] = {}
    for row in rows:
        changes.setdefault(row["arm"], []).append(row["adap_fu"]["loss"] - base[row["seed"]])
    return changes


def table(rows: list[dict]) -> str:
    """All arms in Markdown."""
    has_metric = rows[0]["adap_fu"]["metric"] is not None
    header = ["one change", "seeds", "AdapEmu loss", "AdapFu loss", "AdapFu against base"]
    header += ["AdapEmu metric", "AdapFu metric"] if has_metric else []
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, changes in against_base(rows).items():
        own = [row for row in rows if row["arm"] == name]
        losses = [
            "{:.3f} ± {:.3f}".format(*spread([row[who]["loss"] for row in own])) for who in ("adap_emu", "adap_fu")
        ]
        line = [name, str(len(own)), *losses, "" if name == BASE else "{:+.3f} ± {:.3f}".format(*spread(changes))]
        if has_metric:
            both = [spread([100 * row[who]["metric"] for row in own]) for who in ("adap_emu", "adap_fu")]
            line += ["{:.1f} ± {:.1f}".format(*pair) for pair in both]
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: list[dict], file: Path):
    """How much lower or higher AdapFu's loss is in each arm, at the same seed."""
    changes = {name: values for name, values in against_base(rows).items() if name != BASE}
    names = sorted(changes, key=lambda name: -mean(changes[name]))
    figure = Figure(figsize=(7.5, 1.2 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        average, deviation = spread(changes[name])
        axes.errorbar(average, i, xerr=deviation, fmt="o", capsize=3, color="C0")
        axes.plot(changes[name], [i] * len(changes[name]), ".", color="gray", markersize=4)
    axes.axvline(0, color="gray", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="AdapFu's loss against base, at the same seed (nats per token; left is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(file, dpi=150)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--task", required=True, choices=["svamp", "xquad", "medquad", "gsm8k", "code"])
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument(
        "--arms", nargs="+", help=f"Of these alone: {'; '.join(arms('svamp'))}. '{BASE}' is always run."
    )
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args, flags = parser.parse_known_args(argv)
    unknown = set(args.arms or ()) - arms(args.task).keys()
    if unknown:
        parser.error(f"`--arms` names {sorted(unknown)}, but the arms are {list(arms(args.task))}.")
    return args, flags


def main(argv: list[str] | None = None):
    args, flags = parse_args(argv)
    chosen = [name for name in arms(args.task) if args.arms is None or name in (BASE, *args.arms)]
    rows = [row for name in chosen for row in run(name, args, flags)]
    (args.output_dir / "ablations.json").write_text(json.dumps(rows, indent=2) + "\n")
    (args.output_dir / "ablations.md").write_text(table(rows))
    if len(chosen) > 1:
        plot(rows, args.output_dir / "ablations.png")
    print(table(rows))


if __name__ == "__main__":
    main()
