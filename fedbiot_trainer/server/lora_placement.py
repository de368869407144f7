"""Where the two LoRAs go: a user's LoRA configuration, checked and resolved for a split."""

import copy

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..shared.quantized import is_linear
from .split import LayerSplit


DEFAULT_LORA = {"r": 8, "lora_alpha": 16}


def with_rank(config: LoraConfig | None, r: int) -> LoraConfig:
    """A copy of `config` with another rank and the same `lora_alpha / r`."""
    config = copy.deepcopy(config or LoraConfig(**DEFAULT_LORA))
    config.lora_alpha, config.r = config.lora_alpha * r / config.r, r
    return config


def resolve_peft_config(
    config: LoraConfig, model: PreTrainedModel, split: LayerSplit, layers: tuple[int, ...]
) -> LoraConfig:
    """
    Check a user's LoRA configuration and resolve its target modules to names inside a decoder layer.

    Args:
        config ([`~peft.LoraConfig`]): `target_modules` may be `None` (PEFT's choice for the architecture, else all
            linear layers), `"all-linear"`, a list of names or a regular expression.
        model (`PreTrainedModel`): The full model.
        split ([`LayerSplit`]): Its split.
        layers (`tuple[int, ...]`): Indices in the full model of the layers that get the LoRA.

    Returns:
        [`~peft.LoraConfig`]: A copy whose `target_modules` is a list.

    Raises:
        TypeError: If it is not a `LoraConfig`.
        ValueError: If it asks for something other than LoRA matrices on decoder layers, or matches nothing there.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"`peft_config` must be a `peft.LoraConfig`, got {type(config).__name__}.")
    _refuse_unsupported(config)
    config = copy.deepcopy(config)
    targets = config.target_modules
    if targets is None:
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, "all-linear")
    if not isinstance(targets, str):
        targets = sorted(targets)
    probe = copy.deepcopy(config)
    probe.target_modules = targets
    linear, matched, transposed = set(), set(), False
    for index in layers:
        layer_name = f"{split.layers_name}.{index}"
        for path, module in model.get_submodule(layer_name).named_modules():
            if is_linear(module):
                linear.add(path)
                if targets == "all-linear" or check_target_module_exists(probe, f"{layer_name}.{path}"):
                    matched.add(path)
                    transposed |= isinstance(module, Conv1D)
    if not matched:
        raise ValueError(
            f"`target_modules` is {targets}, which matches no linear layer in the adapter layers of "
            f"{type(model).__name__}. There are: {', '.join(sorted(linear))}."
        )
    config.target_modules = _short_names(matched, linear)
    config.fan_in_fan_out = transposed
    return config


def _refuse_unsupported(config: LoraConfig):
    refused = {
        "modules_to_save": "whole modules would leave the server and come back trained",
        "trainable_token_indices": "embeddings belong to the frozen emulator",
        "target_parameters": "PEFT cannot restrict it to the adapter layers",
        "layers_to_transform": "`num_adapter_layers` decides it",
        "layers_pattern": "it is found from the model",
        "use_dora": "the proximal term is defined for the product of two matrices",
    }
    for name, reason in refused.items():
        if getattr(config, name, None):
            raise ValueError(f"`{name}` is {getattr(config, name)} in `peft_config`, but {reason}. Leave it out.")
    if config.bias != "none":
        raise ValueError(f"`bias` is '{config.bias}' in `peft_config`, but biases are frozen. Use `bias='none'`.")
    if config.init_lora_weights not in (True, "gaussian", "orthogonal"):
        raise ValueError(
            f"`init_lora_weights` is {config.init_lora_weights!r} in `peft_config`, but a LoRA must start as a zero "
            "update and leave the base weights alone. Use True, 'gaussian' or 'orthogonal'."
        )


def _short_names(matched: set[str], linear: set[str]) -> list[str]:
    """`q_proj` instead of `self_attn.q_proj` where no unmatched module has that name too."""
    unmatched_names = {path.rpartition(".")[2] for path in linear - matched}
    names = {path.rpartition(".")[2] for path in matched}
    return sorted(names) if not names & unmatched_names else sorted(matched)


def place_lora(config: LoraConfig, split: LayerSplit, layers: tuple[int, ...], **changes) -> LoraConfig:
    """A copy of `config` for the decoder layers at `layers`."""
    config = copy.deepcopy(config)
    config.layers_to_transform = list(layers)
    config.layers_pattern = [split.layers_name.rpartition(".")[2]]
    config.task_type = "CAUSAL_LM"
    for name, value in changes.items():
        setattr(config, name, value)
    return config
