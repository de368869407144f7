"""What a configuration cannot be, found before any work starts."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .aggregation import ADAPTIVE, AGGREGATION_WEIGHTS, AGGREGATIONS, UNWEIGHTED
from .kinds import check_kinds
from .settings import ALIGNMENT_INITS, ALL_LAYERS, GROUPS, PARTITIONS, TEACHERS
from .training_arguments import refusals


if TYPE_CHECKING:
    from .config import FedBiOTConfig


NEED_KWARGS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
NOT_IN_ROUNDS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")  # beginnings of names of optimizers
ONLY_WITH = {
    "server_learning_rate": ("fedavgm", *ADAPTIVE),
    "server_momentum": ("fedavgm", *ADAPTIVE),
    "server_beta2": ("fedadam", "fedyogi"),
    "server_tau": ADAPTIVE,
    "trim_fraction": ("trimmed_mean",),
    "clip_norm": ("norm_clipping",),
    "num_byzantine": ("multi_krum", "median", "trimmed_mean", "norm_clipping"),
    "client_ranks": ("svd",),
}


def check_config(config: "FedBiOTConfig", changed: Mapping[str, Any]):
    """
    Check the settings of a federated run, of which `changed` are the fields of [`~trl.SFTConfig`] that were set.

    Raises:
        ValueError: If one of them cannot work, or not with another. The message names it and says what would work.
    """
    check_federation(config)
    check_kinds(config)
    for problem in refusals(changed):
        raise ValueError(problem)
    _check_training_arguments(config)


def check_federation(config: Any):
    """The part of [`check_config`] that is about the federation's own settings. It imports nothing."""
    check_kinds(config, GROUPS)
    _check_ranges(config)
    _check_split(config)
    _check_aggregation(config)


def _check_ranges(config):
    if not 0 < config.fraction_train <= 1:
        raise ValueError(
            f"`fraction_train` is {config.fraction_train}, but a share of clients must be in (0, 1]. "
            "1.0 trains every client in every round."
        )
    for name in ("local_steps", "num_clients", "alignment_batch_size", "min_train_clients", "alignment_init_tokens"):
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
    for name in (*non_negative, "eval_rounds", "public_eval_size", "client_zero_shot_examples", "plug_in_steps"):
        if getattr(config, name) < 0:
            raise ValueError(f"`{name}` is {getattr(config, name)}, but it cannot be negative. 0 turns it off.")
    for name in ("alignment_learning_rate", "dirichlet_alpha", "eval_max_new_tokens", "teacher_cache_max_gb"):
        if getattr(config, name) <= 0:
            raise ValueError(f"`{name}` is {getattr(config, name)}, but it must be positive.")
    if config.client_timeout is not None and config.client_timeout <= 0:
        raise ValueError(
            f"`client_timeout` is {config.client_timeout}, but a client needs some seconds. Leave it out for no limit."
        )
    aligned = (
        config.initial_alignment_steps > 0 or config.alignment_steps > 0 or config.alignment_init == "closed_form"
    )
    if config.plug_in_steps > 0 and not aligned:
        raise ValueError(
            f"`plug_in_steps` is {config.plug_in_steps}, but nothing is aligned on public text (`initial_alignment_steps` and "
            "`alignment_steps` are 0), so the emulator has nothing to teach. Align it, or set `plug_in_steps` to 0."
        )
    scales = config.plug_in_scales
    if scales is not None and (not scales or not all(0 <= scale < math.inf for scale in scales)):
        raise ValueError(
            f"`plug_in_scales` is {scales}, but it must be factors of the client LoRA, none of them negative. Try 0.25, 0.5, "
            "0.75 and 1, or leave it out to plug it in as it is."
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
    if config.alignment_init not in ALIGNMENT_INITS:
        raise ValueError(
            f"`alignment_init` is '{config.alignment_init}', but it must be one of {', '.join(ALIGNMENT_INITS)}."
        )
    if config.teacher not in (None, *TEACHERS):
        raise ValueError(f"`teacher` is '{config.teacher}', but it must be one of {', '.join(TEACHERS)}.")
    if config.teacher == "cached" and config.num_adapter_layers_bottom > 0:
        raise ValueError(
            f"`teacher` is 'cached', but `num_adapter_layers_bottom` is {config.num_adapter_layers_bottom}: what the "
            "full model makes of the public text changes with the adapter layers at the bottom, so it cannot be "
            "computed once. Use `teacher='online'`."
        )
    online = config.num_adapter_layers_bottom > 0 if config.teacher is None else config.teacher == "online"
    if config.offload_full_model and online:
        raise ValueError(
            "`offload_full_model` is True, but an online teacher runs the full model in every alignment step. "
            + ("Use `teacher='cached'`." if config.num_adapter_layers_bottom == 0 else "Leave it out.")
        )


def _check_aggregation(config):
    rule = config.aggregation
    for name, allowed in (("aggregation", AGGREGATIONS), ("aggregation_weights", AGGREGATION_WEIGHTS)):
        if getattr(config, name) not in allowed:
            raise ValueError(f"`{name}` is '{getattr(config, name)}', but it must be one of {', '.join(allowed)}.")
    for name, rules in ONLY_WITH.items():
        if getattr(config, name) is not None and rule not in rules:
            raise ValueError(
                f"`{name}` is {getattr(config, name)}, but `aggregation` is '{rule}', which does not use it. Leave it "
                f"out, or use {', '.join(rules)}."
            )
    if not 0 < config.max_client_share <= 1:
        raise ValueError(
            f"`max_client_share` is {config.max_client_share}, but a share of the weight must be in (0, 1]. 1.0 is no cap."
        )
    uniform = config.aggregation_weights == "uniform"
    if config.max_client_share < 1 and (uniform or rule in UNWEIGHTED):
        why = "`aggregation_weights` is 'uniform'" if uniform else f"`aggregation` is '{rule}'"
        raise ValueError(
            f"`max_client_share` is {config.max_client_share}, but {why}, where all clients count the same. Leave it out."
        )
    for name in ("server_learning_rate", "server_tau", "clip_norm"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` is {value}, but it must be positive. Leave it out for the rule's default.")
    for name in ("server_momentum", "server_beta2"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"`{name}` is {value}, but a decay must be in [0, 1).")
    if config.trim_fraction is not None and not 0 < config.trim_fraction < 0.5:
        raise ValueError(
            f"`trim_fraction` is {config.trim_fraction}, but it is left out at each of two ends and must be in (0, 0.5)."
        )
    f = 1 if config.num_byzantine is None else config.num_byzantine
    if f < (1 if rule == "multi_krum" else 0):
        raise ValueError(
            f"`num_byzantine` is {f}, but it is a number of clients"
            + (", and 'multi_krum' leaves out at least 1." if rule == "multi_krum" else ". 0 mixes nothing.")
        )
    if rule == "multi_krum" and config.min_train_clients < 2 * f + 3:
        raise ValueError(
            f"`min_train_clients` is {config.min_train_clients}, but `aggregation` is 'multi_krum', which needs 2 f + 3 "
            f"updates to tell {f} bad one(s) (`num_byzantine`) from the others. Set it to at least {2 * f + 3}."
        )
    if config.freeze_a and rule == "svd":
        raise ValueError(
            "`freeze_a` is True, but `aggregation` is 'svd', which makes both matrices anew. With A fixed, every mean of "
            "the B is exact: use `aggregation='fedavg'`."
        )
    _check_client_ranks(config)


def _check_client_ranks(config):
    pairs = [item.rpartition("=")[::2] for item in config.client_ranks or []]
    if not all(name and rank.isdecimal() and int(rank) > 0 for name, rank in pairs):
        raise ValueError(
            f"`client_ranks` must be NAME=RANK each, with a rank of at least 1, got {config.client_ranks}."
        )
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"`client_ranks` is {config.client_ranks}, which names a client twice.")


def _check_training_arguments(config):
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

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
    optimizer = OptimizerNames(config.optim).value
    if optimizer.startswith(NOT_IN_ROUNDS):
        raise ValueError(
            f"`optim` is '{optimizer}', which needs whole matrices, a step within the backward pass or one long training, but "
            "LoRAs train in rounds, each with a fresh optimizer. Use 'adamw_torch_fused', 'sgd' or 'adafactor'."
        )


def check_batches(config: Any):
    """Raise `ValueError` if an `AcceleratorConfig` says how batches are dealt to processes."""
    default = type(config)()
    for name in ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler"):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"`accelerator_config` has `{name}` {getattr(config, name)}, but a run deals the batches to its processes "
                "itself, so that rounds continue one another. Leave it out."
            )
