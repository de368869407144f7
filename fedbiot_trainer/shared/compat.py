"""
What the libraries do not promise to keep, and this package uses: private attributes, methods of theirs that it
overrides, and names that their documentation leaves out.

`USES` is the list, and tests go through it: each name must exist upstream as described, and nothing private may be
used that is not in it. So an upstream rename is an error at once, also where Python would let it pass in silence: an
override of a method that nobody calls any more changes nothing. What stands by itself is done by a function here.

The code is written for the newest versions. What older ones do otherwise is in `DIFFERENCES`, and made up for by a
function here: nothing else asks for a version.
"""

import copy
import importlib.metadata
import platform
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments


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
class Difference:
    """
    What versions of a library before one of them do otherwise.

    Attributes:
        library (`str`): Its name.
        before (`str`): The first version that needs nothing.
        why (`str`): What the ones before it lack.
        link (`str`): The source of that version.
        test (`str`): The test that fails in the ones before it without what is done here.
    """

    library: str
    before: str
    why: str
    link: str
    test: str

    @property
    def applies(self) -> bool:
        """Whether the installed version is one of them."""
        return Version(importlib.metadata.version(self.library)) < Version(self.before)


_GITHUB = "https://github.com/"
FUSED_HEAD = Difference(
    library="trl",
    before="1.15",
    why="`SFTTrainer` computes the same loss in another function, which no one can call without data",
    link=_GITHUB + "huggingface/trl/blob/v1.15.0/trl/trainer/utils.py",
    test="test_local_step",
)
SCALED_LOSS = Difference(
    library="transformers",
    before="5.19",
    why="`Trainer` does not read `loss_is_scaled_for_ga`; TRL sets what it does read only from 1.15 on",
    link=_GITHUB + "huggingface/transformers/blob/v5.19.0/src/transformers/trainer.py",
    test="test_loss_of_a_trainers_own_is_not_divided_again",
)
GROUPED_HEADS = Difference(
    library="torch",
    before="2.12",
    why="attention whose heads share keys and values is not counted, but an error",
    link=_GITHUB + "pytorch/pytorch/blob/v2.12.0/torch/utils/flop_counter.py",
    test="test_attention_with_grouped_heads_is_counted",
)
EXPERTS = Difference(
    library="peft",
    before="0.20",
    why="loads no LoRA of a model whose experts' weights transformers fuses as it reads them",
    link=_GITHUB + "huggingface/peft/blob/v0.20.0/src/peft/utils/transformers_weight_conversion.py",
    test="test_mixtures_of_experts_are_refused_where_peft_cannot_load_them",
)
CPU_CAPABILITIES = Difference(
    library="torch",
    before="2.13",
    why="tells some instructions of the CPU one by one, and only those of x86",
    link=_GITHUB + "pytorch/pytorch/blob/v2.13.0/torch/cpu/__init__.py",
    test="test_instructions_for_bfloat16_are_found",
)
DIFFERENCES = (FUSED_HEAD, SCALED_LOSS, GROUPED_HEADS, EXPERTS, CPU_CAPABILITIES)


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

# Everything a module keeps of hooks that run with it; hooks for state dicts stay.
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name and ("forward" in name or "backward" in name))


def copy_module(module: nn.Module) -> nn.Module:
    """A new module object around the same parameters, buffers and children, without hooks."""
    new = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(new, name, vars(module)[name].copy())
    new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name in _HOOKS:
        setattr(new, name, OrderedDict())
    # transformers puts hooks on a model that was once asked for hidden states, and this mark; the copy gets its own.
    vars(new).pop("_output_capturing_hooks_installed", None)
    return new


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name, to read and to change: also those that are `None` or stand twice."""
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something is to run before or after the module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def storage_key(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common. Tensors on the meta device have no `data_ptr`."""
    return tensor.untyped_storage()._cdata


def ignore_in_ddp(model: nn.Module, names: Iterable[str]):
    """Let `DistributedDataParallel` neither send nor reduce these parameters and buffers."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


def set_rates(scheduler: LRScheduler, rates: Sequence[float]):
    """Set the learning rates of a scheduler's optimizer, also for those who ask the scheduler."""
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def loss_is_scaled(trainer: Trainer):
    """Have `Trainer` leave the loss of one with `loss_is_scaled_for_ga` as it is."""
    if SCALED_LOSS.applies:
        trainer.model_accepts_loss_kwargs = False
        trainer.compute_loss_func = "not called, and not None: nothing is divided"


def add_fused_lm_head(model: PreTrainedModel, outputs: tuple[str, ...]):
    """
    Let `model(..., labels=labels, fused_lm_head=True)` run as [`~trl.SFTTrainer`] has it, and return `log_probs` of shape
    `(batch_size, sequence_length - 1)`.
    """
    if not FUSED_HEAD.applies:
        from trl.trainer.utils import add_fused_lm_head

        return add_fused_lm_head(model, outputs=outputs)

    def log_probs(hidden, weight, bias, labels):
        logits = nn.functional.linear(hidden.float(), weight.float(), bias if bias is None else bias.float())
        return -cross_entropy(logits, labels, reduction="none")

    def forward(*args, labels, fused_lm_head, **kwargs):
        hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        head, shape = model.get_output_embeddings(), hidden.shape[:2]
        chunks = zip(hidden.flatten(0, 1).split(256), labels[:, 1:].flatten().split(256), strict=True)
        found = [
            checkpoint(log_probs, h, head.weight, head.bias, y, use_reentrant=False, preserve_rng_state=False)
            for h, y in chunks
        ]
        return SimpleNamespace(log_probs=torch.cat(found).view(shape))

    model.forward = forward


def worker_settings(args: TrainingArguments) -> dict[str, Any]:
    """What a `DataLoader` is to be told of its workers, as far as this version has settings for it."""
    names = ("num_workers", "prefetch_factor", "multiprocessing_context", "in_order")
    return {name: getattr(args, f"dataloader_{name}") for name in names if hasattr(args, f"dataloader_{name}")}


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16, as far as torch can tell."""
    if CPU_CAPABILITIES.applies:
        if platform.machine() not in ("x86_64", "AMD64"):
            return True
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def loads_loras(model: PreTrainedModel) -> bool:
    """Whether PEFT can load a LoRA of this model, of whatever layers."""
    if not EXPERTS.applies:
        return True
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping, get_model_conversion_mapping

    try:
        build_peft_weight_mapping(get_model_conversion_mapping(model), "default")
    except TypeError:  # of a constructor of transformers, which has no such argument any more
        return False
    return True


def attention_flops() -> dict[Callable, Callable]:
    """What torch's `FlopCounterMode` is to be told of attention, as `custom_mapping`."""
    if not GROUPED_HEADS.applies:
        return {}

    def forward(query, key, value, *args, **kwargs):
        batch, heads, length, size = query
        return 2 * batch * heads * length * key[2] * (size + value[3])

    def backward(gradient, query, key, value, *args, **kwargs):
        batch, heads, length, size = query
        return 2 * batch * heads * length * key[2] * (3 * size + 2 * value[3])

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention: forward,
        aten._scaled_dot_product_flash_attention_backward: backward,
    }
