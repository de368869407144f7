"""
Print runs of one setting as a Markdown table: mean and standard deviation over seeds, round by round.

    python recipes/gsm8k/table.py outputs/gsm8k-cpu-0.2-* outputs/gsm8k-cpu-0.5-*
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev


METRICS = ("loss", "token_accuracy")


def main(folders: list[str]):
    cells: dict[tuple, list[float]] = defaultdict(list)
    for folder in map(Path, folders):
        summary = json.loads((folder / "summary.json").read_text())
        beta = summary["settings"]["emulator_drop_ratio"]
        for metric in METRICS:
            cells["zero-shot", beta, "adap_fu", metric].append(summary["zero_shot"][metric])
        for line in (folder / "rounds.jsonl").read_text().splitlines():
            record = json.loads(line)
            for model in ("adap_emu", "adap_fu"):
                for metric in METRICS:
                    if record[f"{model}_{metric}"] is not None:  # not each round is evaluated
                        cells[record["server_round"], beta, model, metric].append(record[f"{model}_{metric}"])
    betas = sorted({key[1] for key in cells})
    columns = [(beta, model) for beta in betas for model in ("adap_emu", "adap_fu")]
    names = {"adap_emu": "AdapEmu", "adap_fu": "AdapFu"}
    print("| round | " + " | ".join(f"{names[model]}, beta {beta}" for beta, model in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in ["zero-shot", *sorted({key[0] for key in cells} - {"zero-shot"})]:
        print(f"| {row} | " + " | ".join(cell(cells, row, *column) for column in columns) + " |")


def cell(cells: dict, row, beta: float, model: str) -> str:
    losses, accuracies = (cells.get((row, beta, model, metric), []) for metric in METRICS)
    if not losses:
        return ""
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{mean(losses):.3f}{spread} ({mean(accuracies):.1%})"


if __name__ == "__main__":
    main(sys.argv[1:])
