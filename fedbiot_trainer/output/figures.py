"""The figure of a run's rounds."""

from pathlib import Path
from statistics import mean

from ..shared.records import RoundRecord


COLORS = {"zero_shot": "#7f7f7f", "adap_emu": "#d95f02", "adap_fu": "#1b6ca8"}


def plot_rounds(records: list[RoundRecord], image_file: str | Path):
    """
    Draw the losses and the alignment over the rounds.

    Args:
        records (`list[RoundRecord]`): The objects of `rounds.jsonl`, at least one.
        image_file (`str` or `Path`): Image to write; the suffix decides the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, alignment = figure.subplots(1, 2)

    evaluated = [record for record in records if record.adap_fu_loss is not None]
    rounds = [record.server_round for record in evaluated]
    if evaluated:
        zero_shot = evaluated[0].zero_shot_loss
        losses.axhline(zero_shot, color=COLORS["zero_shot"], linestyle="--", label="zero-shot full model")
        for key, label in (("adap_emu", "AdapEmu"), ("adap_fu", "AdapFu")):
            values = [getattr(record, f"{key}_loss") for record in evaluated]
            losses.plot(rounds, values, color=COLORS[key], marker="o", markersize=3.5, linewidth=2, label=label)
    trained = [(r.server_round, mean(r.client_losses.values())) for r in records if r.client_losses]
    if trained:
        losses.plot(
            *zip(*trained, strict=True), color="#b0b0b0", linewidth=1, label="clients' training loss", zorder=1
        )
    losses.set(title="Loss on held-out text", xlabel="round", ylabel="loss (nats per token)")

    for key, label, color in (
        ("alignment_l2", "hidden states (L2)", "#1b9e77"),
        ("alignment_kl", "logits (KL)", "#7570b3"),
    ):
        points = [(r.server_round, getattr(r, key)) for r in records if getattr(r, key) is not None]
        if points:
            alignment.plot(
                *zip(*points, strict=True), color=color, linewidth=2, marker="o", markersize=3.5, label=label
            )
    alignment.set(title="Emulator against full model, public text", xlabel="round", ylabel="alignment loss")
    for axes in (losses, alignment):
        if axes.lines:
            axes.legend(facecolor="white", edgecolor="none")  # a line behind it would cross its text
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
