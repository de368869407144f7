"""
What the libraries do not promise to keep, and this package uses: private attributes, methods of theirs that it
overrides, and names that their documentation leaves out.

`USES` is the list, and tests go through it: each name must exist upstream as described, and nothing private may be
used that is not in it. So an upstream rename is an error at once, also where Python would let it pass in silence: an
override of a method that nobody calls any more changes nothing. What stands by itself is done by a function of `compat.py`.
"""

from dataclasses import dataclass

from .compat import FUSED_HEAD, LABELS_ALONE, SCALED_LOSS, Difference


# The versions whose source was read, and where it is.
SOURCES = {
    "accelerate": ("1.15.0", "https://github.com/huggingface/accelerate/blob/v1.15.0/src"),
    "bitsandbytes": ("0.50.2", "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2"),
    "deepspeed": ("0.19.8", "https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8"),
    "huggingface_hub": ("2.4.0", "https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src"),
    "peft": ("0.21.2", "https://github.com/huggingface/peft/blob/v0.21.2/src"),
    "torch": ("2.13.0", "https://github.com/pytorch/pytorch/blob/v2.13.0"),
    "transformers": ("5.23.0", "https://github.com/huggingface/transformers/blob/v5.23.0/src"),
    "trl": ("1.16.0", "https://github.com/huggingface/trl/blob/v1.16.0"),
}


@dataclass(frozen=True)
class Use:
    """
    One thing that a library may change without notice.

    Attributes:
        module (`str`): Where it is upstream.
        name (`str`): Its name there: of a class's attribute with the class, as in `"Trainer._prepare_inputs"`.
        why (`str`): What it is used or overridden for.
        test (`str`): The test that fails if it does something else.
        parameters (`tuple[str, ...]`, *optional*): Those of the function or method, if it is one, without `self`.
        but (`Difference`, *optional*): Versions that may lack it.
    """

    module: str
    name: str
    why: str
    test: str
    parameters: tuple[str, ...] | None = None
    but: Difference | None = None

    @property
    def library(self) -> str:
        """The library that it belongs to."""
        return self.module.partition(".")[0]

    @property
    def link(self) -> str:
        """Its source, in the version that was read."""
        return f"{SOURCES[self.library][1]}/{self.module.replace('.', '/')}.py"


_TRAINER, _SFT, _MODULE = "transformers.trainer", "trl.trainer.sft_trainer", "torch.nn.modules.module"
_PREPARED = ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name")
_FUSED_OPTIONS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")

# fmt: off
USES = (
    # Overridden. Under another name they would do nothing.
    Use(_TRAINER, "Trainer.create_accelerator_and_postprocess", "all trainers of a process share one accelerator",
        "test_two_processes_give_what_one_gives", ()),
    Use(_TRAINER, "Trainer._get_num_items_in_batch", "alignment counts tokens, not labels",
        "test_alignment_loss_is_the_formula", ("batch_samples", "device")),
    Use(_TRAINER, "Trainer._get_learning_rate", "named where a training diverges", "test_client_that_diverges_is_left_out", ()),
    Use(_TRAINER, "Trainer._load_best_model", "a checkpoint is a LoRA", "test_the_best_of_its_evaluations", ()),
    Use(_TRAINER, "Trainer._load_from_checkpoint", "a checkpoint is a LoRA",
        "test_resume_from_a_checkpoint", ("resume_from_checkpoint", "model")),
    Use(_SFT, "SFTTrainer._set_signature_columns_if_needed", "keeps the column with a text's place in the store",
        "test_cached_and_online_give_the_same", ()),
    Use(_SFT, "SFTTrainer._tag_names", "tags of a model card", "test_model_card"),
    Use("trl.trainer.base_trainer", "_BaseTrainer.loss_is_scaled_for_ga", "the alignment loss is divided already",
        "test_alignment_loss_is_the_formula", but=SCALED_LOSS),
    Use("peft.tuners.lora.layer", "Linear.forward", "adds the low-rank product in place",
        "test_fused_is_pefts_function", ("x", "args", "kwargs")),
    # Trainer's, called or set.
    Use(_TRAINER, "Trainer._remove_unused_columns", "the training data, as Trainer's own loader has it",
        "test_one_client_without_proximal_term_is_plain_sft", ("dataset", "description")),
    Use(_TRAINER, "Trainer._prepare_inputs", "moves a batch to the device",
        "test_cached_and_online_give_the_same", ("inputs",)),
    Use(_TRAINER, "Trainer._signature_columns", "columns that are kept", "test_cached_and_online_give_the_same"),
    Use(_TRAINER, "Trainer._created_lr_scheduler", "tells Trainer that the scheduler is its own",
        "test_schedule_runs_over_all_rounds"),
    Use(_TRAINER, "Trainer.is_deepspeed_enabled", "what comes with the accelerator",
        "test_accelerate_config_is_understood"),
    Use(_TRAINER, "Trainer.is_fsdp_enabled", "what comes with the accelerator", "test_fsdp2_with_mixed_precision"),
    Use(_TRAINER, "Trainer.gather_function", "what comes with the accelerator",
        "test_two_processes_give_what_one_gives"),
    Use(_TRAINER, "Trainer.deepspeed", "the engine of a training that has ended",
        "test_memory_does_not_grow_with_the_rounds"),
    Use(_TRAINER, "Trainer.model_wrapped", "each training wraps the model anew", "test_rounds_continue_one_another"),
    Use(_TRAINER, "Trainer.current_gradient_accumulation_steps", "divides the proximal term",
        "test_client_gets_the_same_from_batch_times_accumulation"),
    # TRL's.
    Use(_SFT, "SFTTrainer._prepare_dataset", "tokenizes other data as the trainer's own",
        "test_one_client_without_proximal_term_is_plain_sft", _PREPARED),
    Use(_SFT, "SFTTrainer._formatting_func", "the user's form of the data", "test_other_forms_of_data"),
    Use(_SFT, "SFTTrainer._tokenizer", "its size, compared with the embedding's",
        "test_tokenizer_larger_than_the_embedding"),
    Use(_SFT, "SFTTrainer._metrics", "what is logged beside the loss", "test_loss_holds_the_proximal_term"),
    Use(_SFT, "DataCollatorForLanguageModeling", "pads the held-out text", "test_padding_changes_nothing"),
    Use("trl.trainer.utils", "add_fused_lm_head", "a plan counts what the loss costs", "test_local_step", _FUSED_OPTIONS, FUSED_HEAD),
    Use("trl.trainer.utils", "_use_triton", "which positions the loss projects on which device",
        "test_positions_without_a_label_are_not_scored", but=LABELS_ALONE),
    # Of models.
    Use("transformers.configuration_utils", "PreTrainedConfig._attn_implementation", "an emulator has its model's",
        "test_both_models_have_the_same_setting"),
    Use("transformers.configuration_utils", "PreTrainedConfig._name_or_path",
        "where a model came from is not what it is",
        "test_store_does_not_depend_on_where_the_model_is"),
    Use("transformers.utils.output_capturing", "_output_capturing_hooks_installed",
        "a copied module has none of its hooks",
        "test_hidden_states_of_a_model_that_gave_some_before"),
    Use("transformers.pytorch_utils", "Conv1D", "the linear layer of GPT-2", "test_target_modules_are_resolved"),
    Use(_MODULE, "Module._parameters", "a module is copied around its tensors", "test_emulator_shares_every_tensor"),
    Use(_MODULE, "Module._buffers", "a module is copied around its tensors", "test_emulator_shares_every_tensor"),
    Use(_MODULE, "Module._modules", "a module is copied with other children",
        "test_building_leaves_the_full_model_alone"),
    Use(_MODULE, "Module._non_persistent_buffers_set", "a module is copied",
        "test_building_leaves_the_full_model_alone"),
    Use(_MODULE, "Module._forward_hooks", "a hooked layer must be called as a module",
        "test_where_it_does_not_apply_the_forward_is_pefts"),
    Use(_MODULE, "Module._forward_pre_hooks", "a hooked layer must be called as a module",
        "test_where_it_does_not_apply_the_forward_is_pefts"),
    # PEFT's.
    Use("peft.tuners.lora.layer", "LoraLayer.lora_variant", "DoRA and others are not fused",
        "test_where_it_does_not_apply_the_forward_is_pefts"),
    Use("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "PEFT's choice of layers",
        "test_default_targets_of_an_architecture_that_peft_does_not_know"),
    Use("peft.tuners.tuners_utils", "check_target_module_exists", "which layers a configuration means",
        "test_target_modules_are_resolved", ("config", "key")),
    Use("peft.tuners.tuners_utils", "_check_lora_target_modules_mamba", "layers of Mamba that PEFT puts no LoRA on",
        "test_target_modules_are_resolved", ("peft_config", "model", "target_name")),
    Use("peft.tuners.lora.config", "LoraConfig._custom_modules", "custom layers are refused",
        "test_lora_that_cannot_be_federated"),
    # Several processes.
    Use("torch.nn.parallel.distributed", "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "frozen tensors are equal everywhere, and not sent", "test_two_processes_give_what_one_gives",
        ("module", "params_and_buffers_to_ignore")),
    Use("transformers.integrations.deepspeed", "propagate_args_to_deepspeed", "fills in each trainer's batch size",
        "test_batch_sizes_are_each_trainers_own", ("accelerator", "args", "auto_find_batch_size")),
    Use("accelerate.accelerator", "_is_accelerate_prepared", "a mark with which a model is not wrapped for mixed precision",
        "test_every_training_is_in_mixed_precision"),
    Use("accelerate.accelerator", "Accelerator.deepspeed_engine_wrapped", "the engine of a training that has ended",
        "test_memory_does_not_grow_with_the_rounds"),
    Use("accelerate.utils.deepspeed", "DeepSpeedEngineWrapper.engine", "the same",
        "test_memory_does_not_grow_with_the_rounds"),
    Use("deepspeed.runtime.engine", "DeepSpeedEngine.module_forward_pre_hook", "an engine leaves it on its model",
        "test_memory_does_not_grow_with_the_rounds"),
    Use("deepspeed.runtime.engine", "DeepSpeedEngine.module_forward_post_hook", "an engine leaves it on its model",
        "test_memory_does_not_grow_with_the_rounds"),
    Use("deepspeed.runtime.zero.partition_parameters", "ds_id", "ZeRO-3 has the parameter", "test_rounds"),
    Use("deepspeed.runtime.zero.partition_parameters", "ds_shape", "its shape before ZeRO-3 had it", "test_rounds"),
    # Others.
    Use("torch.optim.lr_scheduler", "LRScheduler._last_lr", "what Trainer logs", "test_schedule_runs_over_all_rounds"),
    Use("torch.cpu", "_is_avx512_bf16_supported", "a warning of slow runs", "test_instructions_for_bfloat16_are_found"),
    Use("torch.cpu", "_is_amx_tile_supported", "a warning of slow runs", "test_instructions_for_bfloat16_are_found"),
    Use("torch.storage", "UntypedStorage._cdata", "which tensors share memory, on the meta device too",
        "test_costs_of_a_real_run"),
    Use("torch", "_grouped_mm", "counted for mixtures of experts", "test_mixture_of_experts"),
    Use("torch.ops.aten", "_scaled_dot_product_flash_attention", "counted for attention", "test_local_step"),
    Use("torch.ops.aten", "_scaled_dot_product_flash_attention_backward", "counted for attention",
        "test_attention_with_grouped_heads_is_counted"),
    Use("bitsandbytes.nn.modules", "Linear4bit.support_avx512bf16_for_cpu",
        "keeps weights as they can be trained through",
        "test_model_that_was_repacked_for_inference_is_refused"),
    Use("bitsandbytes.functional", "packing_format_for_cpu", "tells repacked weights",
        "test_model_that_was_repacked_for_inference_is_refused"),
    Use("transformers.integrations.integration_utils", "get_reporting_integration_callbacks",
        "`report_to` for a whole run",
        "test_figure_and_trackers", ("report_to",)),
    Use("transformers.trainer_callback", "CallbackHandler", "`report_to` for a whole run",
        "test_callbacks_see_a_round_as_a_step"),
    Use("huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY", "no telemetry also where it was imported before",
        "test_telemetry"),
)
# fmt: on
