"""What a configuration cannot be, found before any work starts."""

from typing import TYPE_CHECKING, Any

from .settings import ALL_LAYERS, PARTITIONS, TEACHERS


if TYPE_CHECKING:
    from .config import FedBiOTConfig


NEED_KWARGS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")


def check_config(config: "FedBiOTConfig"):
    """
    Check the settings of a federated run.

    Raises:
        ValueError: If one of them cannot work, or not with another. The message names it and says what would work.
    """
    check_federation(config)
    _check_training_arguments(config)


def check_federation(config: Any):
    """The part of [`check_config`] that is about the federation's own settings. It imports nothing."""
    _check_ranges(config)
    _check_split(config)


def _check_ranges(config):
    if not 0 < config.fraction_train <= 1:
        raise ValueError(
            f"`fraction_train` is {config.fraction_train}, but a share of clients must be in (0, 1]. "
            "1.0 trains every client in every round."
        )
    for name in ("local_steps", "num_clients", "alignment_batch_size", "min_train_clients"):
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}, but it must be at least 1.")
    non_negative = (
        "proximal_weight",
        "alignment_kl_weight",
        "initial_alignment_steps",
        "alignment_steps",
        "alignment_warmup_steps",
        "num_adapter_layers_bottom",
        "num_rounds",
        "client_retries",
    )
    for name in (*non_negative, "eval_rounds"):
        if getattr(config, name) < 0:
            raise ValueError(f"`{name}` is {getattr(config, name)}, but it cannot be negative. 0 turns it off.")
    for name in ("alignment_learning_rate", "dirichlet_alpha", "eval_max_new_tokens", "teacher_cache_max_gb"):
        if getattr(config, name) <= 0:
            raise ValueError(f"`{name}` is {getattr(config, name)}, but it must be positive.")
    if config.client_timeout is not None and config.client_timeout <= 0:
        raise ValueError(
            f"`client_timeout` is {config.client_timeout}, but a client needs some seconds. Leave it out for no limit."
        )
    if config.partition not in PARTITIONS:
        raise ValueError(f"`partition` is '{config.partition}', but it must be one of {', '.join(PARTITIONS)}.")
    if config.partition != "iid" and config.partition_column is None:
        raise ValueError(
            f"`partition` is '{config.partition}', which groups examples by a column, but `partition_column` is not "
            "set. Name the column, or use `partition='iid'`."
        )


def _check_split(config):
    if not 0 <= config.emulator_drop_ratio < 1:
        raise ValueError(
            f"`emulator_drop_ratio` is {config.emulator_drop_ratio}, but it is the share of layers to drop and must "
            "be in [0, 1). The paper uses 0.2 and 0.5; 0 keeps the full model."
        )
    if config.num_adapter_layers < 1 and config.num_adapter_layers != ALL_LAYERS:
        raise ValueError(
            f"`num_adapter_layers` is {config.num_adapter_layers}, but it must be at least 1, or -1 for all layers."
        )
    if config.num_adapter_layers == ALL_LAYERS and config.num_adapter_layers_bottom:
        raise ValueError(
            f"`num_adapter_layers_bottom` is {config.num_adapter_layers_bottom}, but `num_adapter_layers` is -1, which "
            "takes all layers. Leave one of them out."
        )
    if config.emulator_lora_r is not None and config.emulator_lora_r < 1:
        raise ValueError(
            f"`emulator_lora_r` is {config.emulator_lora_r}, but a rank must be at least 1. Leave it out to take the "
            "client LoRA's rank."
        )
    if config.teacher not in TEACHERS:
        raise ValueError(f"`teacher` is '{config.teacher}', but it must be one of {', '.join(TEACHERS)}.")
    if config.teacher == "cached" and config.num_adapter_layers_bottom > 0:
        raise ValueError(
            f"`teacher` is 'cached', but `num_adapter_layers_bottom` is {config.num_adapter_layers_bottom}: what the "
            "full model makes of the public text changes with the adapter layers at the bottom, so it cannot be "
            "computed once. Use `teacher='online'`."
        )
    if config.offload_full_model and config.teacher == "online":
        raise ValueError(
            "`offload_full_model` is True, but an online teacher runs the full model in every alignment step. "
            + ("Use `teacher='cached'`." if config.num_adapter_layers_bottom == 0 else "Leave it out.")
        )


def _check_training_arguments(config):
    from transformers import SchedulerType

    if config.max_steps > 0:
        raise ValueError(
            f"`max_steps` is {config.max_steps}, but a federated run counts `num_rounds` rounds of `local_steps` "
            "steps per client. Set those two instead."
        )
    for name in ("lr_scheduler_type", "alignment_lr_scheduler_type"):
        schedule = SchedulerType(getattr(config, name))
        if schedule in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            raise ValueError(
                f"`{name}` is '{schedule.value}', which follows a metric within one training, but LoRAs train in "
                "rounds. Use 'constant', 'linear' or 'cosine'."
            )
    schedule = SchedulerType(config.alignment_lr_scheduler_type)
    if schedule.value in NEED_KWARGS:
        raise ValueError(
            f"`alignment_lr_scheduler_type` is '{schedule.value}', which needs `lr_scheduler_kwargs`, and those are the "
            "clients'. Use 'constant', 'linear' or 'cosine'."
        )
    if config.train_sampling_strategy != "random":
        raise ValueError(
            f"`train_sampling_strategy` is '{config.train_sampling_strategy}', but rounds continue one another in a "
            "random order of the data, and no other is implemented. Use 'random'."
        )
    if config.auto_find_batch_size:
        raise ValueError(
            "`auto_find_batch_size` is True, but it would change the batch size within a run and with it which "
            "examples a client has seen. Set `per_device_train_batch_size`."
        )
    if config.neftune_noise_alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha` is {config.neftune_noise_alpha}, but NEFTune trains through noisy embeddings, "
            "which lie in the frozen emulator. Leave it out."
        )
