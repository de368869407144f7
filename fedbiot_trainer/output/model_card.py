"""The model card of a run's result."""

from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..config import FedBiOTConfig
from ..shared.records import RunSummary
from .tables import ROWS, format_bytes


def write_model_card(folder: str | Path, model_name: str | None, args: FedBiOTConfig, summary: RunSummary | None):
    """
    Write `README.md` with the run's numbers and how to load the result.

    Args:
        folder (`str` or `Path`): The PEFT folder that the card describes.
        model_name (`str`, *optional*): The full model, by name or path.
        args ([`FedBiOTConfig`]): Configuration of the run.
        summary ([`RunSummary`], *optional*): `None` if the run did not end.
    """
    on_hub = model_name is not None and not Path(model_name).exists()
    data = ModelCardData(
        base_model=model_name if on_hub else None,
        library_name="peft",
        tags=["fedbiot", "federated-learning", "lora", "trl"],
    )
    if model_name and not on_hub:  # the card may be published, and nobody else has this machine's folders
        model_name = f"path/to/{Path(model_name).name}"
    template = resources.files(__package__) / "templates" / "model_card.md"
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(),
        base_model=model_name or "path/to/the/base/model",
        args=args,
        results=_results(summary),
        summary=summary,
        format_bytes=format_bytes,
    )
    card.save(Path(folder) / "README.md")


def _results(summary: RunSummary | None) -> str:
    if summary is None or summary.adap_fu is None:
        return "No evaluation set was given."
    metrics = list(summary.adap_fu)
    lines = ["| model | " + " | ".join(metric.replace("_", " ") for metric in metrics) + " |"]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for key, name in ROWS.items():
        lines.append(f"| {name} | " + " | ".join(f"{getattr(summary, key)[metric]:.4f}" for metric in metrics) + " |")
    return "\n".join(lines)
