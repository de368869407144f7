"""The methods that FedBiOT is compared with, as settings of the same run: none has code of its own."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel

from .config import FedBiOTConfig
from .partition import name_client_datasets
from .report import ROWS
from .runner import FederatedRunner


@dataclass(frozen=True)
class Method:
    """
    What a method changes in the settings of a FedBiOT run.

    Attributes:
        description (`str`): The method in one line.
        settings (`dict`, *optional*): Fields of [`FedBiOTConfig`] and their values.
        clients (`str`, *optional*, defaults to `"federated"`):
            `"federated"`; `"pooled"`: one client has all text and takes the steps of all; `"alone"`: a run for each
            client, of which the mean is reported.
        both_ends (`bool`, *optional*, defaults to `False`):
            Whether half of the adapter layers are at the bottom: as many as in FedBiOT, elsewhere.
        align_once (`bool`, *optional*, defaults to `False`):
            Whether all alignment steps of the run are taken before its first round.
    """

    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    clients: str = "federated"
    both_ends: bool = False
    align_once: bool = False

    def configure(self, args: FedBiOTConfig, num_clients: int) -> FedBiOTConfig:
        """A copy of `args` with the method's settings, for a federation of `num_clients` clients."""
        args = copy.copy(args)
        for name, value in self.settings.items():
            setattr(args, name, value)
        if self.both_ends:
            if args.num_adapter_layers < 2:
                raise ValueError(
                    f"`num_adapter_layers` is {args.num_adapter_layers}, but the method has adapter layers at both ends. "
                    "Use at least 2."
                )
            in_all = args.num_adapter_layers + args.num_adapter_layers_bottom
            args.num_adapter_layers_bottom = in_all // 2
            args.num_adapter_layers = in_all - args.num_adapter_layers_bottom
            args.teacher, args.offload_full_model = "online", False
        if self.align_once:
            args.initial_alignment_steps += args.num_rounds * args.alignment_steps
            args.alignment_steps = 0
        if self.clients == "pooled":
            args.local_steps *= args.num_sampled(num_clients)
        return args


NO_ALIGNMENT = {"initial_alignment_steps": 0, "alignment_steps": 0}
DISTILLED_ONCE = {"proximal_weight": 0.0, "alignment_kl_weight": 0.0}

METHODS = {
    "zero_shot": Method("the full model as it is", {"num_rounds": 0, **NO_ALIGNMENT}),
    "offsite_tuning": Method(
        "one party with all text, adapter layers at both ends, emulator distilled once (Xiao et al., 2023)",
        DISTILLED_ONCE,
        clients="pooled",
        both_ends=True,
        align_once=True,
    ),
    "fedot": Method(
        "offsite-tuning with federated averaging (Kuang et al., 2024)", DISTILLED_ONCE, both_ends=True, align_once=True
    ),
    "fedbiot": Method("the settings as they are"),
    "full_lora": Method(
        "federated averaging of a LoRA on all layers: every client holds the full model, an upper bound",
        {
            "num_adapter_layers": -1,
            "num_adapter_layers_bottom": 0,
            "emulator_drop_ratio": 0.0,
            "proximal_weight": 0.0,
            **NO_ALIGNMENT,
        },
    ),
    "local_only": Method("FedBiOT with each client alone; mean over the clients", clients="alone"),
    # One factor at a time
    "fedbiot_both_ends": Method("FedBiOT with adapter layers at both ends", both_ends=True),
    "fedbiot_no_proximal": Method("FedBiOT without the proximal term", {"proximal_weight": 0.0}),
    "fedbiot_align_once": Method("FedBiOT with all alignment before the first round", align_once=True),
    "fedbiot_no_kl": Method("FedBiOT aligned by hidden states alone", {"alignment_kl_weight": 0.0}),
}
COMPARISON = ("zero_shot", "offsite_tuning", "fedot", "fedbiot", "full_lora", "local_only")
ABLATION = ("fedbiot_both_ends", "fedbiot_no_proximal", "fedbiot_align_once", "fedbiot_no_kl")
WITHOUT_EMULATOR = ("zero_shot", "full_lora")  # the same at every drop ratio


def run_method(
    method: str,
    model: str | PreTrainedModel,
    args: FedBiOTConfig,
    client_datasets: Mapping[str, Dataset] | Sequence[tuple[str, Dataset]] | None = None,
    train_dataset: Dataset | None = None,
    **kwargs,
) -> dict:
    """
    Run a method and push its result to the Hub if `args.push_to_hub` is set.

    Args:
        method (`str`): A key of `METHODS`.
        model, args, client_datasets, train_dataset, **kwargs: As for [`FederatedRunner`]; `args` are FedBiOT's.

    Returns:
        `dict`: The content of `summary.json`. For `"local_only"`, each client's run has a folder in `output_dir`, and
        the summary there has the means of their results and costs.

    Raises:
        ValueError: If there is no such method, or it cannot work with the settings.
    """
    if method not in METHODS:
        raise ValueError(f"`method` is '{method}', but it must be one of {', '.join(METHODS)}.")
    chosen = METHODS[method]
    client_datasets = name_client_datasets(client_datasets, train_dataset, args)
    args = chosen.configure(args, len(client_datasets))
    if chosen.clients == "alone":
        return _run_alone(method, model, args, client_datasets, **kwargs)
    if chosen.clients == "pooled":
        client_datasets = {"pooled": concatenate_datasets(list(client_datasets.values()))}
    runner = FederatedRunner(model, args, client_datasets, **kwargs)
    summary = runner.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        runner.console.print(f"pushed to {runner.push_to_hub()}")
    return summary


def _run_alone(method, model, args, client_datasets, **kwargs) -> dict:
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
    folder, summaries = Path(args.output_dir), {}
    for name, dataset in client_datasets.items():
        own = copy.copy(args)
        own.output_dir = str(folder / name)
        summaries[name] = FederatedRunner(model, own, {name: dataset}, **kwargs).train(args.resume_from_checkpoint)
    first = next(iter(summaries.values()))
    summary = {
        key: _means([s[key] for s in summaries.values()])
        for key in (*ROWS, "bytes", "seconds", "tokens_per_example")
        if key in first
    }
    shared = ("split", "rounds", "parameters", "num_public_examples", "settings", "peft_config", "versions")
    summary |= {key: first[key] for key in shared}
    summary["clients"] = {name: {key: s[key] for key in ROWS if key in s} for name, s in summaries.items()}
    if args.process_index == 0:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _means(values: list[dict[str, float | None]]) -> dict[str, float | None]:
    return {key: None if value is None else mean(v[key] for v in values) for key, value in values[0].items()}
