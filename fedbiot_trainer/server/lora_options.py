"""What a user's LoRA configuration may ask for: a list of what is understood, so that a new option of PEFT is not."""

from dataclasses import MISSING, Field, fields

from peft import LoraConfig


# Say where the LoRA goes, how large it is and how it starts, and nothing more.
ALLOWED = {
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
}
# What PEFT writes into a configuration, or what is set here for the model whatever it was.
WITHOUT_EFFECT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
}
REASONS = {
    "modules_to_save": "whole modules would leave the server and come back trained",
    "trainable_token_indices": "embeddings belong to the frozen emulator",
    "target_parameters": "two LoRAs on one model can only have the same parameters in PEFT, and these two have other layers",
    "layers_to_transform": "`num_adapter_layers` decides it",
    "layers_pattern": "it is found from the model",
    "layer_replication": "the layers of the full model are the ones that are split",
    "use_dora": "the proximal term is defined for the product of two matrices",
    "kasa_config": "it changes the frozen weights of the full model",
    "bias": "biases are frozen",
    "lora_bias": "biases are frozen",
}
ZERO_INITS = (True, "gaussian", "orthogonal")


def check_lora_options(config: LoraConfig, argument: str = "peft_config"):
    """
    Check that a LoRA configuration asks for nothing but LoRA matrices that start as a zero update.

    Args:
        config ([`~peft.LoraConfig`]): The configuration.
        argument (`str`, *optional*, defaults to `"peft_config"`): What it was passed as.

    Raises:
        TypeError: If it is not a `LoraConfig`.
        ValueError: If an option is set that is not known to be right here.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"`{argument}` must be a `peft.LoraConfig`, got {type(config).__name__}.")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ALLOWED | WITHOUT_EFFECT or value in (None, [], {}) or value == _default(field):
            continue
        reason = REASONS.get(field.name, "it is not known here what it changes")
        raise ValueError(f"`{field.name}` is {value!r} in `{argument}`, but {reason}. Leave it out.")
    if config._custom_modules:
        raise ValueError(f"`{argument}` has custom LoRA layers, which are not known here. Leave them out.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"`task_type` is '{config.task_type}' in `{argument}`, but the model is a causal LM. Use 'CAUSAL_LM'."
        )
    if config.init_lora_weights not in ZERO_INITS:
        raise ValueError(
            f"`init_lora_weights` is {config.init_lora_weights!r} in `{argument}`, but a LoRA must start as a zero "
            "update and leave the base weights alone. Use True, 'gaussian' or 'orthogonal'."
        )


def _default(field: Field):
    return field.default if field.default_factory is MISSING else field.default_factory()
