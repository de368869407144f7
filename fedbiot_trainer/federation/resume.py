"""Going on with a run: which state to take, and whether it is this run's."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import SchedulerType
from transformers.utils import logging

from ..config import FedBiOTConfig
from ..output.run_folder import ROUNDS, RunFolder
from ..shared.records import RoundRecord
from .state import FederationState


logger = logging.get_logger(__name__)

T = TypeVar("T")

# What may change when a run goes on: it changes no number of the training. All other settings must be the same.
HARMLESS = {
    # where things go and what is shown
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_total_limit", "save_after_clients", "report_to",
    "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_strategy",
    "logging_first_step", "logging_steps", "logging_nan_inf_filter", "log_level", "log_level_replica", "log_on_each_node",
    "disable_tqdm", "include_num_input_tokens_seen", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token",
    "hub_private_repo", "hub_always_push", "hub_revision", "save_strategy", "save_steps", "save_on_each_node",
    "save_only_model", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
    # evaluation
    "eval_rounds", "eval_metric", "eval_reference_column", "eval_max_new_tokens", "eval_drift", "per_device_eval_batch_size",
    "client_zero_shot_examples", "public_eval_size",  # the public text that is left is compared
    "plug_in_scales", "plug_in_steps",
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    # how work is done, not what
    "teacher_cache_dir", "teacher_cache_max_gb", "offload_full_model", "dataset_num_proc", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor", "use_cpu", "local_rank",
    "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config", "ddp_backend", "ddp_timeout",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "torch_empty_cache_steps",
    "skip_memory_metrics", "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "debug",
    # who answers
    "client_timeout", "client_retries", "min_train_clients",
    # counted together below, with the number of processes
    "per_device_train_batch_size", "gradient_accumulation_steps", "alignment_batch_size",
    # checked apart: `can_extend`
    "num_rounds",
    # how a training set becomes the clients', which the state does not know
    "num_clients", "partition", "partition_column", "dirichlet_alpha",
    # the model's own, compared by what was loaded
    "model_init_kwargs", "trust_remote_code",
}  # fmt: skip
CONSTANT = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


def claim(
    folder: RunFolder,
    checkpoint: str | bool | None,
    settings: dict[str, Any],
    args: FedBiOTConfig,
    held_out: str | None = None,
) -> FederationState | None:
    """
    Take the folder for a run, and find in it, or elsewhere, what to go on from. All processes must call it.

    Args:
        folder ([`RunFolder`]): The run's folder.
        checkpoint (`str` or `bool`, *optional*): As for [`find_state`]. Without one a new run begins.
        settings (`dict`): What [`run_settings`] has made.
        args ([`FedBiOTConfig`]): Configuration.
        held_out (`str`, *optional*): Digest of the text that rounds are evaluated on. Scores on another are forgotten.

    Returns:
        [`FederationState`], *optional*: Where to go on.

    Raises:
        ValueError: If another run is or was in the folder, or the state belongs to another run.
    """
    in_place = checkpoint and _is_in(folder, checkpoint)
    if not in_place:
        folder.check_free()
    PartialState().wait_for_everyone()  # all have seen whether it is free
    _on_main(folder.claim)
    state = find_state(folder, checkpoint) if checkpoint else None
    if state is not None:
        check_settings(state.settings, settings, args, state.server_round)
        if None not in (held_out, state.held_out) and held_out != state.held_out:
            state.zero_shot = state.best = None
            logger.warning(
                "`eval_dataset` is another than before: zero-shot is evaluated on it anew, and the best round is one of those "
                "from here on."
            )
    if not in_place:
        folder.clear()
    if state is not None:
        folder.set_records(state.records)
        if PartialState().is_main_process:
            state.delete_later(folder.state)
    return state


def _is_in(folder: RunFolder, checkpoint: str | bool) -> bool:
    """Whether a checkpoint is the folder's own."""
    if str(checkpoint).lower() == "true":
        return True
    path, own = Path(str(checkpoint)).resolve(), folder.path.resolve()
    return own in (path, *path.parents)


def run_settings(args: FedBiOTConfig, **content: Any) -> dict[str, Any]:
    """
    What makes a run this run, as plain values.

    Args:
        args ([`FedBiOTConfig`]): Configuration.
        **content: What else must be the same: the split, the LoRAs, digests of the weights and the public text.
    """
    settings = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in HARMLESS}
    world = args.world_size
    settings["train_batch"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
    settings["alignment_batch"] = args.alignment_batch_size * world
    settings["num_rounds"] = args.num_rounds
    return json.loads(json.dumps({**settings, **content}, default=_plain, sort_keys=True))


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def check_settings(then: dict[str, Any], now: dict[str, Any], args: FedBiOTConfig, server_round: int):
    """
    Check that a state belongs to a run with these settings.

    Raises:
        ValueError: If one of them would make it another run. All differences are named.
    """
    then, now = map(_by_key, (then, now))
    different = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if "num_rounds" in different:
        if args.num_rounds < server_round:
            raise ValueError(
                f"`num_rounds` is {args.num_rounds}, but the state is after round {server_round}. Set at least that many."
            )
        if can_extend(args):
            different.remove("num_rounds")
    if different:
        lines = "".join(
            f"\n  {name}: {_short(then.get(name))} then, {_short(now.get(name))} now" for name in different
        )
        hint = " More rounds need constant learning-rate schedules." if "num_rounds" in different else ""
        raise ValueError(
            f"`resume_from_checkpoint` is set, but the settings would make it another run:{lines}\n{hint}".strip()
        )


def can_extend(args: FedBiOTConfig) -> bool:
    """Whether the steps so far are the same in a run of another number of rounds."""
    kinds = args.lr_scheduler_type, args.alignment_lr_scheduler_type
    share_of_all = 0 < (args.warmup_steps or 0) < 1  # a warmup of that share of the steps
    return all(SchedulerType(kind) in CONSTANT for kind in kinds) and not share_of_all


def _by_key(values: dict[str, Any]) -> dict[str, Any]:
    """With the keys of what is a dictionary itself behind its name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def find_state(folder: RunFolder, checkpoint: str | bool) -> FederationState | None:
    """
    The state to go on from.

    Args:
        folder ([`RunFolder`]): The run's folder.
        checkpoint (`str` or `bool`): `True` takes the newest state in it. A path: of another run's folder, of its
            `state/`, or of one file in there.

    Returns:
        [`FederationState`], *optional*: `None` if the run has none yet: it was stopped before its first round.

    Raises:
        ValueError: If there is nothing to go on from at that path, or what is there is damaged.
    """
    return _on_main(lambda: _find(folder, checkpoint))


def _on_main(work: Callable[[], T]) -> T:
    """Work that the main process alone can do. All get its result, or raise what it raised."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:  # raised below, in all of them: the others would wait for the result
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return result


def _find(folder: RunFolder, checkpoint: str | bool) -> FederationState | None:
    in_place = str(checkpoint).lower() == "true"
    path = folder.path if in_place else Path(str(checkpoint))
    states = path.parent if path.is_file() else path / "state" if (path / "state").is_dir() else path
    state = FederationState.load(path) if path.is_file() else FederationState.load_newest(states)
    if state is not None:
        earlier = RoundRecord.read_all(states.parent / ROUNDS)
        state.records = [*(r for r in earlier if r.server_round < state.server_round), *state.records]
        return state
    if any(states.glob("round-*.safetensors")):
        raise ValueError(f"`resume_from_checkpoint` is set, but every state in '{states}' is damaged.")
    if not in_place:
        raise ValueError(f"`resume_from_checkpoint` is '{checkpoint}', but there is no state of a run.")
    if folder.rounds.exists() or (folder.path / "summary.json").exists():
        raise ValueError(
            f"`resume_from_checkpoint` is set, but '{folder.path}' holds the results of a run without its state. Choose "
            "another `output_dir`."
        )
    logger.warning(f"There is no state in '{folder.path}' yet: the run starts from the beginning.")
    return None
