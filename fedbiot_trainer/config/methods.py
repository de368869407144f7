"""The methods that FedBiOT is compared with, as settings of the same run: none has code of its own."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import FedBiOTConfig


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


NO_ALIGNMENT = {"initial_alignment_steps": 0, "alignment_steps": 0, "alignment_init": "zero", "plug_in_steps": 0}
DISTILLED_ONCE = {"proximal_weight": 0.0, "alignment_kl_weight": 0.0, "alignment_init": "zero", "plug_in_steps": 0}
# The paper's code, in what is a choice of the method's: rounds, steps, LoRAs and data are those of the run.
PAPER = {
    "proximal_weight": 0.01,
    "initial_alignment_steps": 500,
    "alignment_steps": 10,
    "alignment_kl_weight": 0.9,
    "alignment_learning_rate": 5e-4,
    "alignment_lr_scheduler_type": "constant",
    "alignment_warmup_steps": 0,
    "alignment_init": "zero",
    "plug_in_steps": 0,
}
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
    "fedbiot_paper": Method("FedBiOT as the paper's code sets it", PAPER),
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
    "ceiling": Method(
        "FedBiOT with nothing dropped: the most that these adapter layers can give",
        {"emulator_drop_ratio": 0.0, **NO_ALIGNMENT},
    ),
    "local_only": Method("FedBiOT with each client alone; mean over the clients", clients="alone"),
    # One factor at a time
    "fedbiot_both_ends": Method("FedBiOT with adapter layers at both ends", both_ends=True),
    "fedbiot_no_proximal": Method("FedBiOT without the proximal term", {"proximal_weight": 0.0}),
    "fedbiot_align_once": Method("FedBiOT with all alignment before the first round", align_once=True),
    "fedbiot_no_kl": Method("FedBiOT aligned by hidden states alone", {"alignment_kl_weight": 0.0}),
    "fedbiot_closed_form": Method(
        "FedBiOT with a computed start of the emulator LoRA", {"alignment_init": "closed_form"}
    ),
}


COMPARISON = (
    "zero_shot", "offsite_tuning", "fedot", "fedbiot_paper", "fedbiot", "ceiling", "full_lora", "local_only",
)  # fmt: skip
ABLATION = ("fedbiot_both_ends", "fedbiot_no_proximal", "fedbiot_align_once", "fedbiot_no_kl", "fedbiot_closed_form")
WITHOUT_EMULATOR = ("zero_shot", "ceiling", "full_lora")  # the same at every drop ratio
