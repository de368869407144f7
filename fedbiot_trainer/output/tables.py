"""Tables and lines at the start and the end of a run."""

from pathlib import Path

from rich.table import Table

from ..shared.records import ParameterCounts, RunSummary, SplitRecord


ROWS = {
    "zero_shot": "zero-shot full model",
    "adap_emu": "AdapEmu (what clients run)",
    "adap_fu": "AdapFu (full model)",
}


# Metrics to show in percent.
SHARES = ("accuracy", "exact_match", "pass_at_")


def split_table(
    split: SplitRecord,
    parameters: ParameterCounts,
    bytes_once: int,
    bytes_per_round: tuple[int, int],
    num_clients: int,
) -> Table:
    """
    The resolved split, as a table.

    Args:
        split ([`SplitRecord`]): Which layers are where.
        parameters ([`ParameterCounts`]): Sizes of the parts.
        bytes_once (`int`): Size of the emulator package.
        bytes_per_round (`tuple[int, int]`): To and from each client.
        num_clients (`int`): Clients in a round.
    """
    table = Table(title="FedBiOT split", title_justify="left", show_edge=False)
    table.add_column("part")
    table.add_column("layers")
    table.add_column("parameters", justify="right")
    table.add_row("full model", f"0-{split.num_layers - 1}", f"{parameters.full:,}")
    table.add_row("emulator keeps", ", ".join(map(str, split.kept)), "")
    table.add_row("emulator drops", ", ".join(map(str, split.dropped)) or "none", "")
    table.add_row("adapter layers", ", ".join(map(str, split.adapter_layers)), f"{parameters.adapter_layers:,}")
    table.add_row(
        "a client sees",
        f"{split.num_layers - len(split.dropped)} of {split.num_layers}",
        f"{parameters.adap_emu:,} ({parameters.client_share:.0%})",
    )
    table.add_row("client LoRA", "on the adapter layers", f"{parameters.trainable_client:,}")
    table.add_row("emulator LoRA", "on the emulator", f"{parameters.trainable_server:,}")
    table.add_row("bytes once", "emulator package, each client", format_bytes(bytes_once))
    down, up = map(format_bytes, bytes_per_round)
    table.add_row("bytes per round", f"each of {num_clients} clients", f"{down} down, {up} up")
    return table


def result_table(summary: RunSummary) -> Table:
    """Zero-shot, AdapEmu and AdapFu, with gain, gap, bytes and time below."""
    metrics = list(summary.adap_fu or ())
    table = Table(title="Result on held-out text", title_justify="left", show_edge=False)
    table.add_column("")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for key, name in ROWS.items():
        table.add_row(name, *(_number(metric, getattr(summary, key)[metric]) for metric in metrics))
    table.add_section()
    for name, one, other in (
        ("gain: AdapFu - zero-shot", "adap_fu", "zero_shot"),
        ("gap: AdapFu - AdapEmu", "adap_fu", "adap_emu"),
    ):
        cells = (
            _number(metric, getattr(summary, one)[metric] - getattr(summary, other)[metric], "+") for metric in metrics
        )
        table.add_row(name, *cells)
    return table


def _number(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if any(share in metric for share in SHARES) else f"{value:{sign}.4f}"


def format_bytes(size: float) -> str:
    """`1234567` as `1.2 MB` (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def result_lines(summary: RunSummary, folder: Path) -> list[str]:
    """Bytes, time and place of the results."""
    sizes = summary.bytes
    uncovered = []
    if summary.uncovered:
        uncovered = [f"the public text does not cover: {', '.join(summary.uncovered)} (`uncovered` in summary.json)"]
    best = []
    if summary.best_round is not None:
        compared = summary.rounds if summary.settings["eval_rounds"] == 1 else "those evaluated"
        best.append(f"result: round {summary.best_round}, the best of {compared}")
    elif summary.adap_fu is None and summary.rounds > 0:
        best.append(
            "result: the last round; without held-out text (`eval_dataset`) nothing says whether another is better"
        )
    learning = summary.plug_in_learning
    if learning is not None:
        scores = (
            "" if learning.metric is None else f", {learning.metric} {learning.before:.4f} to {learning.after:.4f}"
        )
        best.append(
            f"{learning.steps} steps of the client LoRA in the full model: KL {learning.first_kl:.3f} to {learning.last_kl:.3f}"
            f"{scores}, {'kept' if learning.kept else 'not kept'}"
        )
    plug_in = summary.plug_in
    if plug_in is not None:
        values = ", ".join(f"{value:.4f} at {scale}" for scale, value in plug_in.values.items())
        best.append(f"client LoRA plugged in at {plug_in.scale:g} of its strength: {plug_in.metric} {values}")
    return [
        "",
        *best,
        *uncovered,
        f"bytes: {format_bytes(sizes['down'])} down and {format_bytes(sizes['up'])} up in {summary.rounds} rounds, "
        f"{format_bytes(sizes['once_per_client'])} once to each client",
        f"time: {summary.seconds['total']:.0f} s, results in {folder}",
    ]
