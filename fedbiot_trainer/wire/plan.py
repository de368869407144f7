"""What the owner decides of the clients' training, once for a whole run. On what hardware they train, they decide."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import FedBiOTConfig
from ..shared.processes import is_main_process


FILE = "training_plan.json"
SCHEMA_VERSION = 1

# Fields of `FedBiOTConfig` that say what is learned: the owner's.
PLANNED = (
    "num_rounds", "local_steps", "proximal_weight", "freeze_a", "client_zero_shot_examples",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "average_tokens_across_devices", "router_aux_loss_coef", "loss_type",
    "completion_only_loss", "assistant_only_loss", "max_length", "truncation_mode", "packing", "packing_strategy",
    "seed", "data_seed", "shuffle_dataset", "dataloader_drop_last",
)  # fmt: skip

# Those that say how it is computed and shown: a site's.
SITES = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "model_init_kwargs",
    "use_cpu", "bf16", "fp16", "tf32", "full_determinism",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "use_liger_kernel", "liger_kernel_config", "padding_free",
    "pad_to_multiple_of", "dataset_text_field", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
    "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "local_rank",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "accelerator_config",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """
    The owner's part of the clients' training. It lies in the emulator package; each round's part is in [`LocalWork`].

    Attributes:
        batch_size (`int`): Examples of an optimizer step, over all processes and micro-batches of a client.
        settings (`dict`): The fields of [`FedBiOTConfig`] that the owner decides, by name.
        ranks (`dict[str, int]`, *optional*): Clients whose LoRA has a smaller rank than the package's.
    """

    batch_size: int
    settings: dict[str, Any]
    ranks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, args: FedBiOTConfig, completion_only_loss: bool | None = None) -> "TrainingPlan":
        """
        The plan of a run.

        Args:
            args ([`FedBiOTConfig`]): Its configuration.
            completion_only_loss (`bool`, *optional*): Whether completions alone count where `args` leaves that open.
        """
        values = args.to_dict()
        if values["completion_only_loss"] is None:
            values["completion_only_loss"] = completion_only_loss
        return cls(args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                   {name: values[name] for name in PLANNED}, args.ranks)  # fmt: skip

    def save(self, folder: str | Path):
        """Write it into the folder of an emulator package. The main process does."""
        if is_main_process():
            Path(folder).mkdir(parents=True, exist_ok=True)
            content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
            Path(folder, FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "TrainingPlan":
        """
        Read it from an emulator package.

        Raises:
            FileNotFoundError: If the folder has none.
            ValueError: If it is not one that this version of the library can follow to the letter.
        """
        file = Path(folder, FILE)
        if not file.is_file():
            raise FileNotFoundError(
                f"'{folder}' has no {FILE}. A run writes it into its emulator package; ask the owner for the whole folder."
            )
        content = json.loads(file.read_text())
        version = content.pop("schema_version", None)
        settings = content.get("settings", {})
        wrong = sorted((set(PLANNED) ^ settings.keys()) | ({f.name for f in fields(cls)} ^ content.keys()))
        if version != SCHEMA_VERSION or wrong:
            raise ValueError(
                f"The training plan '{file}' has schema version {version}, and this library reads {SCHEMA_VERSION}; they "
                f"differ in {', '.join(wrong) or 'nothing else'}. Install the version of fedbiot-trainer that the owner uses."
            )
        if type(content["batch_size"]) is not int or content["batch_size"] < 1:
            raise ValueError(
                f"`batch_size` of the training plan '{file}' is {content['batch_size']!r}, which is no number."
            )
        return cls(**content)

    def arguments(self, output_dir: str, **site: Any) -> FedBiOTConfig:
        """
        The configuration of a [`ClientSFTTrainer`] that follows the plan, in each of the site's processes.

        Args:
            output_dir (`str`): The site's folder.
            **site: Fields of [`FedBiOTConfig`] about the site's hardware. `per_device_train_batch_size` is how many examples
                fit in a device's memory at once; by default, a process's whole share of the batch.

        Raises:
            ValueError: If a field is not for a site to decide, or the batch cannot be cut so.
        """
        for name, value in site.items():
            if name in SITES:
                continue
            why = (
                "which the owner decides in the training plan"
                if name in PLANNED
                else "which is no setting of a site's"
            )
            raise ValueError(f"`{name}` is {value!r}, {why}. A site may set: {', '.join(SITES)}.")
        processes = int(os.environ.get("WORLD_SIZE", 1))
        size = site.pop("per_device_train_batch_size", None) or max(1, self.batch_size // processes)
        steps, left = divmod(self.batch_size, size * processes)
        if left or not steps:
            fitting = [n for n in range(1, self.batch_size + 1) if self.batch_size % (n * processes) == 0]
            possible = f"Set it to one of {fitting}" if fitting else "Use a number of processes that divides it"
            raise ValueError(
                f"`per_device_train_batch_size` is {size} in {processes} processes, but the owner's batch of "
                f"{self.batch_size} examples cannot be cut into such parts. {possible}."
            )
        return FedBiOTConfig(
            output_dir,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            report_to="none",
            **{**self.settings, **site},
        )
