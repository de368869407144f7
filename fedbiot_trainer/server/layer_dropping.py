"""Build a model without some of its decoder layers, around the same tensors."""

import copy
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..shared.compat import children, copy_module
from ..shared.processes import whole_shape
from ..shared.quantized import is_linear, keep_weight_layout
from .split import LayerSplit, layer_count_name


# Names under which decoder layers and their attention modules keep their own position.
_INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_index", "layer_number")
# Names of settings that list some of the layers.
_LISTS_LAYERS = re.compile("(indices|_layers|layer_ids)$")


def drop_layers(model: PreTrainedModel, split: LayerSplit) -> PreTrainedModel:
    """
    Build emulator + adapter layers (or, with a split that drops nothing, a twin of the full model).

    The result is a model of the same class with fewer layers. Its parameters are the full model's own `Parameter`
    objects (equal `data_ptr()`), its modules are new. `model` is not changed.

    Raises:
        ValueError: If the architecture ties layers to each other or to their position in a way that dropping layers
            breaks, or if the model was already patched or wrapped.
    """
    _refuse_entangled_layers(model)
    keep_weight_layout(model)
    config = _shrink_config(model.config, split)
    smaller = _twin(model, split, {id(model.config): config, **_subconfigs(model.config, config)})
    smaller.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    layers = cast(nn.ModuleList, smaller.get_submodule(split.layers_name))
    for position, layer in enumerate(layers):
        for module in layer.modules():
            for attribute in _INDEX_ATTRIBUTES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, position)
    _check_rebuild(smaller, split)
    return smaller


def _refuse_entangled_layers(model):
    config = model.config.get_text_config()
    for attribute in ("num_kv_shared_layers", "scale_attn_by_inverse_layer_idx"):
        if getattr(config, attribute, None):
            raise ValueError(
                f"`model` is {type(model).__name__} with `config.{attribute}={getattr(config, attribute)}`, so a layer "
                "depends on its position or on other layers, and dropping layers would change what the others compute."
            )
    for path, module in model.named_modules():
        if getattr(config, "rescale_every", 0) and getattr(module, "layers_are_rescaled", False):
            raise ValueError(
                f"`model` is {type(model).__name__}, which has been evaluated, and scales its weights in place then, by "
                "the position of the layer. Pass a freshly loaded model."
            )
        if "forward" in vars(module):
            raise ValueError(
                f"`model` is {type(model).__name__} whose `{path or 'forward'}` was patched by another library (a "
                "trainer was built on it, or it is spread over devices). Pass a freshly loaded model."
            )


def _shrink_config(config: PretrainedConfig, split: LayerSplit) -> PretrainedConfig:
    """Copy `config` with fewer layers; every per-layer list in it (`layer_types`, ...) keeps the same layers."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    for name, value in list(vars(text_config).items()):
        per_layer = isinstance(value, (list, tuple)) and len(value) == split.num_layers
        if _LISTS_LAYERS.search(name) and _are_layers(value, split):
            positions = [split.full_indices.index(i) for i in value if i in split.full_indices]
            setattr(text_config, name, type(value)(positions))
        elif per_layer and not name.endswith("token_id") and name != "architectures":
            setattr(text_config, name, type(value)(value[i] for i in split.full_indices))
    setattr(text_config, layer_count_name(text_config), len(split.full_indices))
    overrides = text_config.to_dict().get("per_layer_config")
    if overrides:
        overrides = {int(index): changes for index, changes in overrides.items()}
        text_config.per_layer_config = None
        text_config.per_layer_config = {
            position: overrides[full] for position, full in enumerate(split.full_indices) if full in overrides
        }
    if getattr(text_config, "rescale_every", None):
        text_config.rescale_every = 0  # RWKV would scale weights in place, and the full model's are the emulator's
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        skipped = getattr(getattr(config, "quantization_config", None), name, None)
        if skipped is not None:
            setattr(config.quantization_config, name, split.rename_kept(skipped))
    return config


def _are_layers(value, split: LayerSplit) -> bool:
    """Whether they can be indices of layers, in order: flags for each layer repeat themselves."""
    indices = isinstance(value, (list, tuple)) and all(type(i) is int and 0 <= i < split.num_layers for i in value)
    return indices and all(a < b for a, b in pairwise(value))


def _subconfigs(old: PretrainedConfig, new: PretrainedConfig) -> dict[int, PretrainedConfig]:
    return {id(value): getattr(new, name) for name, value in vars(old).items() if isinstance(value, PretrainedConfig)}


def _twin(root: nn.Module, split: LayerSplit, configs: dict[int, PretrainedConfig]) -> Any:
    """New module objects around the same tensors, without the dropped layers and without hooks."""
    twins: dict[int, nn.Module] = {}

    def twin(module: nn.Module, path: str) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        new = copy_module(module)
        twins[id(module)] = new
        if id(vars(module).get("config")) in configs:
            new.config = configs[id(module.config)]
        inside = list(children(module).items())
        if path == split.layers_name:
            layers = cast(nn.ModuleList, module)
            inside = [(str(i), layers[full]) for i, full in enumerate(split.full_indices)]
        children(new).clear()
        for name, child in inside:
            children(new)[name] = child if child is None else twin(child, f"{path}.{name}" if path else name)
        return new

    return twin(root, "")


def _check_rebuild(smaller: PreTrainedModel, split: LayerSplit):
    """Raise if a model built anew from the emulator's config would differ: the package could not be loaded."""
    config = type(smaller.config).from_dict(smaller.config.to_dict())
    config._attn_implementation = smaller.config._attn_implementation
    try:
        with torch.device("meta"):
            rebuilt = type(smaller)(config)
    except Exception as error:
        raise ValueError(
            f"`model` is {type(smaller).__name__}, whose config cannot describe the layers {split.full_indices}: "
            f"{error}. This architecture is not supported."
        ) from error
    quantized = getattr(smaller, "hf_quantizer", None) is not None
    ours, theirs = (dict(_layer_attributes(model, split, quantized)) for model in (smaller, rebuilt))
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if different:
        key = min(different)
        raise ValueError(
            f"`model` is {type(smaller).__name__}, in which `{key}` depends on the layer's position in a way that "
            f"`config` cannot describe ({ours.get(key)} in the full model, {theirs.get(key)} after loading), so "
            "dropping layers would change it. This architecture is not supported."
        )
    shapes = [
        {name: whole_shape(p) for name, p in m.named_parameters() if not name.startswith(f"{split.layers_name}.")}
        for m in (smaller, rebuilt)
    ]
    different = [name for name in shapes[1] if shapes[0].get(name) != shapes[1][name]]
    if different and not quantized:
        raise ValueError(
            f"`model` is {type(smaller).__name__}, in which `{different[0]}`, which is no decoder layer, depends on how "
            "many there are, so dropping layers would change it. This architecture is not supported."
        )


def _layer_attributes(model: PreTrainedModel, split: LayerSplit, quantized: bool) -> Iterator[tuple[str, Any]]:
    layers = model.get_submodule(split.layers_name)
    for path, module in layers.named_modules():
        if quantized and is_linear(module):
            continue  # quantization has put another layer in its place
        yield path, type(module).__name__
        for name, value in vars(module).items():
            state = name.startswith("_") or name in ("training", "gradient_checkpointing")
            if isinstance(value, (bool, int, float, str)) and not state:
                yield f"{path}.{name}", value
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}", whole_shape(parameter)
