"""Tables at the start and the end of a run, and the figure of its rounds."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from datasets import Dataset
from rich.table import Table

from .lora import SplitModel
from .sharding import whole_shape


ROWS = {
    "zero_shot": "zero-shot full model",
    "adap_emu": "AdapEmu (what clients run)",
    "adap_fu": "AdapFu (full model)",
}
# Metrics to show in percent.
SHARES = ("token_accuracy", "exact_match", "gsm8k_accuracy", "pass_at_")
COLORS = {"zero_shot": "#7f7f7f", "adap_emu": "#d95f02", "adap_fu": "#1b6ca8"}


def count_parameters(model: SplitModel) -> dict[str, float]:
    """
    Parameters of the parts, as numbers of scalars; shared tensors count once.

    Returns:
        `dict`: `full`, `emulator` (emulator + adapter layers, without LoRA), `adapter_layers`, `trainable_client`,
        `trainable_server` and `client_share` (part of the full model's parameters that a client sees).
    """
    full = sum(_numel(p) for name, p in model.full.named_parameters() if "lora_" not in name)
    emulator = sum(_numel(p) for p in model.package_model.parameters())
    layers = model.package_model.get_submodule(model.split.layers_name)
    adapter_layers = sum(_numel(p) for i in model.split.adapter_positions for p in layers[i].parameters())
    lora = dict.fromkeys(("client", "emulator"), 0)
    for name, parameter in model.emulator.named_parameters():
        for adapter in lora:
            lora[adapter] += _numel(parameter) if f".{adapter}." in name and "lora_" in name else 0
    return {
        "full": full,
        "emulator": emulator,
        "adapter_layers": adapter_layers,
        "trainable_client": lora["client"],
        "trainable_server": lora["emulator"],
        "client_share": emulator / full,
    }


def mean_length(texts: Iterable[Dataset]) -> float:
    """Mean number of tokens of the examples of tokenized datasets."""
    return mean(len(ids) for text in texts for ids in text["input_ids"])


def _numel(parameter):
    """Scalars of a parameter; bitsandbytes packs 4-bit ones and keeps the shape aside."""
    state = getattr(parameter, "quant_state", None)
    return (whole_shape(parameter) if state is None else state.shape).numel()


def split_table(
    model: SplitModel, parameters: dict, bytes_once: int, bytes_per_round: tuple[int, int] | None, num_clients: int
) -> Table:
    """
    The resolved split, as a table.

    Args:
        model ([`SplitModel`]): The full model and its emulator.
        parameters (`dict`): From [`count_parameters`].
        bytes_once (`int`): Size of the emulator package.
        bytes_per_round (`tuple[int, int]`, *optional*): To and from each client. `None` if they are not counted.
        num_clients (`int`): Clients in a round.
    """
    split = model.split
    table = Table(title="FedBiOT split", title_justify="left", show_edge=False)
    table.add_column("part")
    table.add_column("layers")
    table.add_column("parameters", justify="right")
    table.add_row("full model", f"0-{split.num_layers - 1}", f"{parameters['full']:,}")
    table.add_row("emulator keeps", ", ".join(map(str, split.kept)), "")
    table.add_row("emulator drops", ", ".join(map(str, split.dropped)) or "none", "")
    table.add_row("adapter layers", ", ".join(map(str, split.adapter_indices)), f"{parameters['adapter_layers']:,}")
    table.add_row(
        "a client sees",
        f"{len(split.full_indices)} of {split.num_layers}",
        f"{parameters['emulator']:,} ({parameters['client_share']:.0%})",
    )
    table.add_row("client LoRA", "on the adapter layers", f"{parameters['trainable_client']:,}")
    table.add_row("emulator LoRA", "on the emulator", f"{parameters['trainable_server']:,}")
    table.add_row("bytes once", "emulator package, each client", format_bytes(bytes_once))
    if bytes_per_round is not None:
        down, up = map(format_bytes, bytes_per_round)
        table.add_row("bytes per round", f"each of {num_clients} clients", f"{down} down, {up} up")
    return table


def result_table(summary: dict) -> Table:
    """Zero-shot, AdapEmu and AdapFu, with gain, gap, bytes and time below."""
    metrics = list(summary["adap_fu"])
    table = Table(title="Result on held-out text", title_justify="left", show_edge=False)
    table.add_column("")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for key, name in ROWS.items():
        table.add_row(name, *(_number(metric, summary[key][metric]) for metric in metrics))
    table.add_section()
    for name, one, other in (
        ("gain: AdapFu - zero-shot", "adap_fu", "zero_shot"),
        ("gap: AdapFu - AdapEmu", "adap_fu", "adap_emu"),
    ):
        cells = (_number(metric, summary[one][metric] - summary[other][metric], "+") for metric in metrics)
        table.add_row(name, *cells)
    return table


def _number(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}" if metric.startswith(SHARES) else f"{value:{sign}.4f}"


def format_bytes(size: float) -> str:
    """`1234567` as `1.2 MB` (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def result_lines(summary: dict, folder: Path) -> list[str]:
    """Bytes, time and place of the results."""
    lines = [""]
    sizes = summary["bytes"]
    if sizes["up"] is not None:
        lines.append(
            f"bytes: {format_bytes(sizes['down'])} down and {format_bytes(sizes['up'])} up in {summary['rounds']} "
            f"rounds, {format_bytes(sizes['once_per_client'])} once to each client"
        )
    return [*lines, f"time: {summary['seconds']['total']:.0f} s, results in {folder}"]


def plot_rounds(records: list[dict], image_file: str | Path):
    """
    Draw the losses and the alignment over the rounds.

    Args:
        records (`list[dict]`): The objects of `rounds.jsonl`, at least one.
        image_file (`str` or `Path`): Image to write; the suffix decides the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, alignment = figure.subplots(1, 2)

    evaluated = [record for record in records if record["adap_fu_loss"] is not None]
    rounds = [record["server_round"] for record in evaluated]
    if evaluated:
        zero_shot = evaluated[0]["zero_shot_loss"]
        losses.axhline(zero_shot, color=COLORS["zero_shot"], linestyle="--", label="zero-shot full model")
        for key, label in (("adap_emu", "AdapEmu"), ("adap_fu", "AdapFu")):
            values = [record[f"{key}_loss"] for record in evaluated]
            losses.plot(rounds, values, color=COLORS[key], marker="o", markersize=3.5, linewidth=2, label=label)
    trained = [(r["server_round"], mean(r["client_losses"].values())) for r in records if r["client_losses"]]
    if trained:
        losses.plot(
            *zip(*trained, strict=True), color="#b0b0b0", linewidth=1, label="clients' training loss", zorder=1
        )
    losses.set(title="Loss on held-out text", xlabel="round", ylabel="loss (nats per token)")

    for key, label, color in (
        ("alignment_l2", "hidden states (L2)", "#1b9e77"),
        ("alignment_kl", "logits (KL)", "#7570b3"),
    ):
        points = [(r["server_round"], r[key]) for r in records if r[key] is not None]
        if points:
            alignment.plot(
                *zip(*points, strict=True), color=color, linewidth=2, marker="o", markersize=3.5, label=label
            )
    alignment.set(title="Emulator against full model, public text", xlabel="round", ylabel="alignment loss")
    for axes in (losses, alignment):
        if axes.lines:
            axes.legend(frameon=False)
        values = [value for line in axes.lines for value in line.get_ydata()]
        if min(values, default=0) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif axes is alignment:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.title.set_fontweight("bold")
    figure.savefig(image_file, dpi=150)
