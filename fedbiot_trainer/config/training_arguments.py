"""
What becomes of each field of [`~trl.SFTConfig`] in a [`FederatedRunner`]: used, refused, or without effect. The check of a
configuration, the warning of a run and docs/settings.md follow from this list. It imports nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Used:
    """A field that has the effect one expects of it; `where`."""

    where: str


@dataclass(frozen=True)
class Refused:
    """A field that cannot be set: `why`, and what would work."""

    why: str


@dataclass(frozen=True)
class NoEffect:
    """A field that nothing reads: `why`, and what does it. Values in `anyway` ask for what happens anyway."""

    why: str
    anyway: tuple[Any, ...] = ()


CLIENTS = Used("the clients' local steps")
BOTH = Used("the clients' local steps and the alignment")
LORAS_SAVED = "the LoRAs are saved after each round, no checkpoint is"
LOGGED = "every round is logged, its steps are not"
EVALUATED = "evaluations follow `eval_rounds`"
NO_COMPUTE_METRICS = "evaluation goes its own way: of generated text, `eval_metric` makes a metric"
PUSHED = "the result is pushed once, at the end"
DDP = Used("several processes with DDP")

TREATMENTS: dict[str, Used | Refused | NoEffect] = {
    "output_dir": Used("all that a run writes"),
    # How long, and at which rate
    "per_device_train_batch_size": Used("the clients' local steps; the alignment has `alignment_batch_size`"),
    "num_train_epochs": NoEffect("a run counts `num_rounds` rounds of `local_steps` steps"),
    "max_steps": Refused(
        "a federated run counts `num_rounds` rounds of `local_steps` steps per client. Set those two instead"
    ),
    "learning_rate": Used("the clients' local steps; the alignment has `alignment_learning_rate`"),
    "lr_scheduler_type": Used("the clients' local steps, over all rounds; those that follow a metric are refused"),
    "lr_scheduler_kwargs": CLIENTS,
    "warmup_steps": Used(
        "the clients' local steps, once in all rounds; a share is of all rounds; also with 'constant'"
    ),
    "optim": Used(
        "the clients' local steps and the alignment, anew in each round; GaLore, APOLLO, LOMO and schedule-free ones are refused"
    ),
    "optim_args": BOTH,
    "optim_target_modules": Refused(
        "GaLore and APOLLO, which it is for, train whole matrices by their gradients of low rank, and a run trains LoRAs. "
        "Leave it out, and set `target_modules` of `peft_config` for where LoRAs go"
    ),
    "weight_decay": BOTH,
    "adam_beta1": BOTH,
    "adam_beta2": BOTH,
    "adam_epsilon": BOTH,
    "gradient_accumulation_steps": CLIENTS,
    "average_tokens_across_devices": CLIENTS,
    "max_grad_norm": BOTH,
    "label_smoothing_factor": CLIENTS,
    "auto_find_batch_size": Refused(
        "it would change the batch size within a run and with it which examples a client has seen. Set "
        "`per_device_train_batch_size`"
    ),
    "neftune_noise_alpha": Refused(
        "NEFTune trains through noisy embeddings, which lie in the frozen emulator. Leave it out"
    ),
    # Precision, memory and speed
    "bf16": Used("all steps and evaluations"),
    "fp16": Used("all steps and evaluations"),
    "bf16_full_eval": NoEffect("evaluation has the precision of training (`bf16`, or the model's dtype)"),
    "fp16_full_eval": NoEffect("evaluation has the precision of training (`fp16`, or the model's dtype)"),
    "tf32": Used("the whole process"),
    "activation_checkpointing": CLIENTS,
    "activation_checkpointing_kwargs": CLIENTS,
    "gradient_checkpointing": CLIENTS,
    "gradient_checkpointing_kwargs": CLIENTS,
    "activation_offloading": BOTH,
    "torch_compile": BOTH,
    "torch_compile_backend": BOTH,
    "torch_compile_mode": BOTH,
    "torch_empty_cache_steps": Used("the clients' local steps and the alignment, counted within a round"),
    "use_liger_kernel": BOTH,
    "liger_kernel_config": BOTH,
    "use_cache": NoEffect("steps never use a cache, and generation always does"),
    "use_cpu": Used("the whole run"),
    "full_determinism": Used("the whole process"),
    "debug": Refused(
        "its hooks would be put on the model again in each round. A loss that is not finite is reported without it. Leave "
        "it out"
    ),
    # What is shown
    "logging_strategy": NoEffect(LOGGED),
    "logging_steps": NoEffect(LOGGED, anyway=(1,)),
    "logging_first_step": NoEffect(LOGGED, anyway=(True,)),
    "logging_nan_inf_filter": NoEffect("a loss that is not finite leaves its client out of the round"),
    "include_num_input_tokens_seen": NoEffect(
        "`summary.json` has the numbers of examples and their mean lengths", anyway=(False,)
    ),
    "skip_memory_metrics": NoEffect("memory is not measured; `fedbiot plan` counts what a client needs"),
    "log_level": Used("the whole process"),
    "log_level_replica": Used("the whole process"),
    "log_on_each_node": Used("which of the two levels a process has"),
    "disable_tqdm": Used("lines in place of the live display"),
    "report_to": Used("trackers, for whom a round is a step"),
    "run_name": Used("trackers"),
    "project": Used("trackers"),
    "trackio_space_id": Used("trackers"),
    "trackio_bucket_id": Used("trackers"),
    "trackio_static_space_id": Used("trackers"),
    # Evaluation
    "do_train": NoEffect("`train()` trains", anyway=(True,)),
    "do_eval": NoEffect("what has an `eval_dataset` is evaluated", anyway=(True,)),
    "do_predict": NoEffect("generation is evaluated with `eval_metric`"),
    "eval_strategy": NoEffect(EVALUATED),
    "eval_steps": NoEffect(EVALUATED),
    "eval_delay": NoEffect(EVALUATED),
    "eval_on_start": NoEffect("the full model is always evaluated at the start", anyway=(True,)),
    "per_device_eval_batch_size": Used("evaluations"),
    "eval_packing": NoEffect("held-out text is never packed", anyway=(False,)),
    "prediction_loss_only": NoEffect(NO_COMPUTE_METRICS),
    "eval_do_concat_batches": NoEffect(NO_COMPUTE_METRICS),
    "eval_use_gather_object": NoEffect(NO_COMPUTE_METRICS),
    "eval_accumulation_steps": NoEffect(NO_COMPUTE_METRICS),
    "include_for_metrics": NoEffect(NO_COMPUTE_METRICS),
    "batch_eval_metrics": NoEffect(NO_COMPUTE_METRICS),
    "label_names": NoEffect(NO_COMPUTE_METRICS),
    "load_best_model_at_end": Used("the result is the best evaluated round's, not the last one's"),
    "metric_for_best_model": Used("what that is, AdapFu's loss by default; what early stopping watches"),
    "greater_is_better": Used("the same"),
    # What is kept
    "save_strategy": NoEffect(LORAS_SAVED),
    "save_steps": NoEffect(LORAS_SAVED, anyway=(1,)),
    "save_only_model": NoEffect(LORAS_SAVED),
    "save_on_each_node": NoEffect("the main process writes"),
    "save_total_limit": Used("states that a run can go on from; at least 2 are kept"),
    "enable_jit_checkpoint": NoEffect("SIGTERM always ends a run with its state on disk", anyway=(True,)),
    "resume_from_checkpoint": Used("going on with a run, after its newest state or one at a path"),
    "ignore_data_skip": NoEffect("a resumed run goes on in the data where it was"),
    "restore_callback_states_from_checkpoint": NoEffect(
        "callbacks that keep a state are always brought to where the run was", anyway=(True,)
    ),
    "push_to_hub": Used("the result, at the end"),
    "hub_model_id": Used("`push_to_hub`"),
    "hub_token": Used("`push_to_hub`"),
    "hub_private_repo": Used("`push_to_hub`"),
    "hub_revision": Used("`push_to_hub`"),
    "hub_strategy": NoEffect(PUSHED, anyway=("end",)),
    "hub_always_push": NoEffect(PUSHED),
    # Seeds and data
    "seed": Used("all that is random"),
    "data_seed": Used("the order of the clients' and the public examples"),
    "dataloader_drop_last": BOTH,
    "dataloader_num_workers": BOTH,
    "dataloader_pin_memory": BOTH,
    "dataloader_prefetch_factor": BOTH,
    "dataloader_multiprocessing_context": BOTH,
    "dataloader_in_order": BOTH,
    "dataloader_persistent_workers": NoEffect("every round has workers of its own"),
    "remove_unused_columns": BOTH,
    "train_sampling_strategy": Refused(
        "rounds continue one another in a random order of the data, and no other is implemented. Use 'random'"
    ),
    "length_column_name": NoEffect("it is for orders by length, and rounds go through the data in a random one"),
    # Several processes
    "local_rank": Used("launchers of several processes"),
    "ddp_find_unused_parameters": DDP,
    "ddp_bucket_cap_mb": DDP,
    "ddp_broadcast_buffers": DDP,
    "ddp_static_graph": DDP,
    "ddp_backend": DDP,
    "ddp_timeout": DDP,
    "fsdp": Used("several processes with FSDP2; see accelerate_configs/"),
    "fsdp_config": Used("the same"),
    "deepspeed": Used("several processes with ZeRO-2 and ZeRO-3; see accelerate_configs/"),
    "accelerator_config": Used("the whole run; what is about dealing batches to processes is refused"),
    "parallelism_config": Refused(
        "a run's processes share out the data and, with FSDP2 and ZeRO-3, the weights; tensor, context and sequence "
        "parallelism are not implemented. Use a configuration of accelerate_configs/"
    ),
    # TRL's own
    "model_init_kwargs": Used("a model that is given by name"),
    "trust_remote_code": Used("a model and a tokenizer that are given by name"),
    "router_aux_loss_coef": CLIENTS,
    "chat_template_path": Used("all text that is conversations"),
    "dataset_text_field": Used("all text"),
    "dataset_kwargs": Refused(
        "its one key skips what counts a client's examples. A dataset with `input_ids` and `labels` is taken as it is: "
        "leave it out"
    ),
    "dataset_num_proc": Used("tokenizing"),
    "eos_token": Used("all text, the package and the result"),
    "pad_token": Used("all batches"),
    "max_length": Used("all text"),
    "truncation_mode": Used("all text"),
    "shuffle_dataset": BOTH,
    "packing": CLIENTS,
    "packing_strategy": CLIENTS,
    "padding_free": CLIENTS,
    "pad_to_multiple_of": BOTH,
    "completion_only_loss": Used("the clients' local steps and evaluations; every token counts in the alignment"),
    "assistant_only_loss": Used("the clients' local steps and evaluations; every token counts in the alignment"),
    "loss_type": CLIENTS,
}


def refusals(changed: Mapping[str, Any]) -> list[str]:
    """What is wrong with settings that differ from their defaults. What turns one off is not."""
    return [
        f"`{name}` is {value!r}, but {treatment.why}."
        for name, value in changed.items()
        if isinstance(treatment := TREATMENTS.get(name), Refused) and value and value != -1
    ]


def without_effect(changed: Mapping[str, Any]) -> dict[str, str]:
    """
    Of settings that differ from their defaults, those that have no effect, each with what to say of it. One that is not
    in the list is from a version of TRL that this one does not know.
    """
    said = {}
    for name, value in changed.items():
        treatment = TREATMENTS.get(name)
        if treatment is None:
            said[name] = (
                f"`{name}` is {value!r}, which this version of fedbiot-trainer does not know: it may have no effect."
            )
        elif isinstance(treatment, NoEffect) and value not in treatment.anyway:
            said[name] = f"`{name}` is {value!r}, which has no effect: {treatment.why}."
    return said
