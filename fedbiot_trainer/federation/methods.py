"""Runs of the methods that FedBiOT is compared with."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel

from ..config import FedBiOTConfig
from ..config.methods import METHODS
from ..data.partition import name_client_datasets
from ..output.run_folder import folder_name
from ..output.tables import ROWS
from ..shared.arguments import check_args
from ..shared.records import RunSummary
from .runner import FederatedRunner


def run_method(
    method: str,
    model: str | PreTrainedModel,
    args: FedBiOTConfig,
    client_datasets: Mapping[str, Dataset] | Sequence[tuple[str, Dataset]] | None = None,
    train_dataset: Dataset | None = None,
    **kwargs,
) -> RunSummary:
    """
    Run a method.

    Args:
        method (`str`): A key of `METHODS`.
        model, args, client_datasets, train_dataset, **kwargs: As for [`FederatedRunner`]; `args` are FedBiOT's.

    Returns:
        [`RunSummary`]: The content of `summary.json`. For `"local_only"`, each client's run has a folder in `output_dir`, and
        the summary there has the means of their results and costs.

    Raises:
        ValueError: If there is no such method, or it cannot work with the settings.
    """
    if method not in METHODS:
        raise ValueError(f"`method` is '{method}', but it must be one of {', '.join(METHODS)}.")
    check_args(args)
    chosen = METHODS[method]
    client_datasets = name_client_datasets(client_datasets, train_dataset, args)
    args = chosen.configure(args, len(client_datasets))
    if chosen.clients == "alone":
        return _run_alone(method, model, args, client_datasets, **kwargs)
    if chosen.clients == "pooled":
        client_datasets = {"pooled": concatenate_datasets(list(client_datasets.values()))}
    return FederatedRunner(model, args, client_datasets, **kwargs).train()


def _run_alone(method, model, args, client_datasets, **kwargs) -> RunSummary:
    if args.deepspeed_plugin is not None:
        raise ValueError(
            f"`method` is '{method}', which makes a run for each client, but a process can use DeepSpeed for one run only. "
            "Give each client a run of its own with `client_datasets`, or launch with DDP."
        )
    if args.push_to_hub:
        raise ValueError(
            f"`push_to_hub` is True, but `method` is '{method}', which ends with a result for each client. Push the "
            "folders that you want with `huggingface_hub`."
        )
    if args.resume_from_checkpoint not in (None, True, "true", "True"):
        raise ValueError(
            f"`resume_from_checkpoint` is '{args.resume_from_checkpoint}', but `method` is '{method}', which has a state "
            "for each client. Set it to True: each goes on from its own, in `output_dir`."
        )
    folder, summaries = Path(args.output_dir), {}
    for name, dataset in client_datasets.items():
        own = copy.copy(args)
        own.output_dir = str(folder / folder_name(name))
        summaries[name] = FederatedRunner(model, own, {name: dataset}, **kwargs).train()
    means: dict[str, Any] = {
        key: _means([getattr(summary, key) for summary in summaries.values()])
        for key in (*ROWS, "bytes", "seconds", "tokens_per_example")
    }
    summary = replace(
        next(iter(summaries.values())),
        **means,
        best_round=None,
        plug_in_learning=None,
        plug_in=None,
        num_examples={name: s.num_examples[name] for name, s in summaries.items()},
        client_zero_shot_losses={k: v for s in summaries.values() for k, v in s.client_zero_shot_losses.items()},
        uncovered={k: v for s in summaries.values() for k, v in s.uncovered.items()},
        clients={name: {key: getattr(s, key) for key in ROWS} for name, s in summaries.items()},
    )
    if args.process_index == 0:
        summary.write(folder / "summary.json")
    return summary


def _means(values: list[dict[str, Any] | None]) -> dict[str, float | None] | None:
    """The mean of each number; `None` for what was not measured."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    return {key: None if value is None else mean(v[key] for v in measured) for key, value in measured[0].items()}
