"""Every knob of a federated run, on top of TRL's `SFTConfig`."""

import copy
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from transformers import SchedulerType
from trl import SFTConfig

from . import training_arguments
from .aggregation import AggregationSettings
from .checks import check_batches, check_config
from .settings import AlignmentSettings, EvaluationSettings, FederationSettings, PartitionSettings, SplitSettings


@dataclass
class FedBiOTConfig(
    EvaluationSettings,
    PartitionSettings,
    AlignmentSettings,
    AggregationSettings,
    FederationSettings,
    SplitSettings,
    SFTConfig,
):
    r"""
    Configuration of a FedBiOT run ([paper](https://huggingface.co/papers/2406.17706)).

    It is an [`~trl.SFTConfig`]: `learning_rate`, `per_device_train_batch_size`, `max_length`, `packing` and the rest
    mean what they mean there and hold for the **clients'** local steps. The federation's own settings are those of
    [`SplitSettings`], [`FederationSettings`], [`AggregationSettings`], [`AlignmentSettings`], [`PartitionSettings`] and
    [`EvaluationSettings`].

    > [!NOTE]
    > What the defaults and other values gave where they were measured is in docs/choosing.md of the repository.

    > [!NOTE]
    > Defaults that differ from [`~trl.SFTConfig`]: `learning_rate` 5e-4, `lr_scheduler_type` `"constant"`,
    > `adam_beta2` 0.95 (all as in the paper's code), `gradient_checkpointing` `False` (nothing below the adapter layers
    > keeps activations for a client's backward pass), `save_strategy` `"no"` (a run saves its LoRAs after each round; a
    > checkpoint would land in the package that clients get), and `bf16` follows what the machine has. `warmup_steps` and
    > `lr_scheduler_type` span all rounds of a client, not one round, and `"constant"` has a warmup if one is set.
    """

    learning_rate: float = field(
        default=5e-4,
        metadata={
            "help": "Learning rate of the clients' AdamW. The default is for billions of parameters; small models took "
            "2e-3 to 5e-3."
        },
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning-rate schedule of a client, over all its rounds."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW, for clients and alignment."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision of bfloat16. Default: where there is a GPU that has it."}
    )
    save_strategy: str = field(
        default="no", metadata={"help": "A run saves its LoRAs after each round, and no checkpoints."}
    )
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the result is the best evaluated round's, by `metric_for_best_model`, and not the last one's. By "
            "default it is where rounds are evaluated."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Deprecated in transformers: use activation_checkpointing. Off by default here."},
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            setattr(self, name, _plain(value))
        self._changed = self._changed_arguments()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        check_config(self, self._changed)
        if self.teacher is None:
            self.teacher = "online" if self.num_adapter_layers_bottom > 0 else "cached"
        # Transformers would ask for checkpoints as often as evaluations; the best round's LoRAs are in the state.
        keeps_best, self.load_best_model_at_end = self.load_best_model_at_end, False
        super().__post_init__()
        self.load_best_model_at_end = keeps_best
        check_batches(self.accelerator_config)

    def _changed_arguments(self) -> dict[str, Any]:
        """The fields of [`~trl.SFTConfig`] that differ from their defaults: before it resolves them, those that were set."""
        changed = {}
        for inherited in fields(SFTConfig):
            own = type(self).__dataclass_fields__[inherited.name]
            default = own.default if own.default_factory is MISSING else own.default_factory()
            if getattr(self, own.name) != default:
                changed[own.name] = getattr(self, own.name)
        return changed

    def init_kwargs(self) -> dict:
        """What a model given by name is loaded with."""
        return {"trust_remote_code": self.trust_remote_code, **(self.model_init_kwargs or {})}

    @property
    def aligns(self) -> bool:
        """Whether the emulator is aligned in the run."""
        return self.initial_alignment_steps > 0 or self.alignment_steps > 0 or self.computes_start

    @property
    def computes_start(self) -> bool:
        """Whether the emulator LoRA's start is computed, where layers are dropped and it can be."""
        return self.alignment_init == "closed_form" or (
            self.alignment_init == "auto" and self.initial_alignment_steps > 0
        )

    def client_arguments(self) -> "FedBiOTConfig":
        """A copy for one client's local steps: `max_steps` is `local_steps`."""
        args = copy.copy(self)
        args.max_steps = self.local_steps
        return args

    def alignment_arguments(self) -> "FedBiOTConfig":
        """A copy for the alignment: its own learning rate, batch size and steps, every token of the text counts."""
        args = copy.copy(self)
        args.max_steps = max(self.initial_alignment_steps, 1)
        args.learning_rate = self.alignment_learning_rate
        args.lr_scheduler_type = SchedulerType(self.alignment_lr_scheduler_type)
        args.warmup_steps = self.alignment_warmup_steps
        args.lr_scheduler_kwargs = None
        args.per_device_train_batch_size = self.alignment_batch_size
        args.gradient_accumulation_steps = 1
        args.activation_checkpointing = args.gradient_checkpointing = False
        args.completion_only_loss = False
        args.assistant_only_loss = False
        args.packing, args.padding_free = False, False
        return args

    def without_effect(self) -> dict[str, str]:
        """The fields of [`~trl.SFTConfig`] that were set although a [`FederatedRunner`] does not read them, each
        with what to say of it."""
        return training_arguments.without_effect(self._changed)

    def quiet(self) -> "FedBiOTConfig":
        """A copy for a trainer inside a [`FederatedRunner`]: the runner logs, saves and reports, the trainer does not."""
        args = copy.copy(self)
        args.report_to = []
        args.disable_tqdm = True
        args.push_to_hub = args.load_best_model_at_end = args.eval_on_start = args.enable_jit_checkpoint = False
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            setattr(args, name, type(getattr(args, name))("no"))
        return args


def _plain(value: Any) -> Any:
    """A setting as JSON has it: of NumPy's numbers and of paths, Python's and their text."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
