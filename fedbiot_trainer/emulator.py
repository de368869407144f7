"""Cut a causal LM into emulator and adapter layers: find the decoder layers, choose what stays, build, index map.

The emulator is made of new module objects around the *same* parameter tensors as the full model, so it costs no
memory, and whatever is later injected into one (LoRA layers, hooks) is not seen by the other.
"""

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config_checks import ALL_LAYERS
from .sharding import whole_shape


# Names under which decoder layers and their attention modules keep their own position.
_INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_index", "layer_number")
# Everything a module keeps of hooks that run with it; hooks for state dicts stay.
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name and ("forward" in name or "backward" in name))


@dataclass(frozen=True)
class EmulatorSplit:
    """
    Which decoder layers of the full model are where.

    Attributes:
        layers_name (`str`): Qualified name of the decoder layers, e.g. `"model.layers"`.
        num_layers (`int`): Decoder layers of the full model.
        num_adapter_layers (`int`): Layers nearest to the output that clients train.
        kept (`tuple[int, ...]`): Indices in the full model of the layers that the emulator keeps.
        num_adapter_layers_bottom (`int`, *optional*, defaults to `0`): Layers nearest to the input that clients train.
    """

    layers_name: str
    num_layers: int
    num_adapter_layers: int
    kept: tuple[int, ...]
    num_adapter_layers_bottom: int = 0

    @property
    def top_index(self) -> int:
        """Index in the full model of the first adapter layer above the emulator."""
        return self.num_layers - self.num_adapter_layers

    @property
    def top_position(self) -> int:
        """Position of that layer in emulator + adapter layers."""
        return self.num_adapter_layers_bottom + len(self.kept)

    @property
    def adapter_indices(self) -> tuple[int, ...]:
        """Indices of the adapter layers in the full model."""
        return (*range(self.num_adapter_layers_bottom), *range(self.top_index, self.num_layers))

    @property
    def full_indices(self) -> tuple[int, ...]:
        """Full-model index of each layer of emulator + adapter layers, in order."""
        return tuple(sorted(self.kept + self.adapter_indices))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the layers that only the full model has."""
        return tuple(i for i in range(self.num_layers) if i not in set(self.full_indices))

    @property
    def emulator_positions(self) -> tuple[int, ...]:
        """Positions of the emulator's layers in emulator + adapter layers."""
        return tuple(range(self.num_adapter_layers_bottom, self.top_position))

    @property
    def adapter_positions(self) -> tuple[int, ...]:
        """Positions of the adapter layers in emulator + adapter layers."""
        return (*range(self.num_adapter_layers_bottom), *range(self.top_position, len(self.full_indices)))

    def without_drops(self) -> "EmulatorSplit":
        """The same split with all layers of the full emulator kept."""
        return replace(self, kept=tuple(range(self.num_adapter_layers_bottom, self.top_index)))

    def to_full(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename layer positions in a state dict's keys to the full model's layer indices (plug in)."""
        return self._rename(state, dict(enumerate(self.full_indices)))

    def to_emulator(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of [`to_full`] (extract)."""
        return self._rename(state, {full: position for position, full in enumerate(self.full_indices)})

    def rename_kept(self, names: list[str]) -> list[str]:
        """Module names in the full model as names in the emulator, without those in dropped layers."""
        dropped = re.compile(rf"(?:^|\.){re.escape(self.layers_name)}\.(?:{'|'.join(map(str, self.dropped))})(?:\.|$)")
        return list(self.to_emulator({name: None for name in names if not dropped.search(name)}))

    def _rename(self, state, index_map):
        pattern = re.compile(rf"((?:^|\.){re.escape(self.layers_name)}\.)(\d+)(?=\.|$)")
        return {
            pattern.sub(lambda match: f"{match[1]}{index_map[int(match[2])]}", key, count=1): tensor
            for key, tensor in state.items()
        }


def kept_layer_indices(num_emulator_layers: int, drop_ratio: float) -> tuple[int, ...]:
    """
    Choose the layers that stay, evenly spaced, the first and the last among them (paper, section 4.1).

    Args:
        num_emulator_layers (`int`): Layers below the adapter layers, at least 1.
        drop_ratio (`float`): Share to drop, in `[0, 1)`.

    Returns:
        `tuple[int, ...]`: Distinct, increasing indices. A single kept layer is layer 0.
    """
    num_kept = max(1, math.floor((1 - drop_ratio) * num_emulator_layers + 0.5))
    if num_kept == 1:
        return (0,)
    return tuple(math.floor(j * (num_emulator_layers - 1) / (num_kept - 1) + 0.5) for j in range(num_kept))


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, quantized or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """
    Find the stack of decoder layers: the outermost `ModuleList` as long as the config says the decoder is deep.

    Raises:
        ValueError: If the model is an encoder-decoder, or has no such list or several.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"`model` is {name}, an encoder-decoder. FedBiOT splits decoder-only causal LMs.")
    num_layers = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not nested:
            found[path] = module
    if len(found) != 1:
        raise ValueError(
            f"`model` is {name}, in which {len(found)} lists of {num_layers} decoder layers were found "
            f"({', '.join(found) or 'none'}), so it cannot be split. It must be a causal LM that keeps its "
            "`config.num_hidden_layers` layers in one `nn.ModuleList`."
        )
    return next(iter(found.items()))


def split_layers(
    model: PreTrainedModel, num_adapter_layers: int, drop_ratio: float, num_adapter_layers_bottom: int = 0
) -> EmulatorSplit:
    """
    Decide the split of `model`.

    Args:
        model (`PreTrainedModel`): The full model.
        num_adapter_layers (`int`): Layers nearest to the output that clients train; -1 for all layers of the model.
        drop_ratio (`float`): Share of the layers between the adapter layers to drop, in `[0, 1)`.
        num_adapter_layers_bottom (`int`, *optional*, defaults to `0`): Layers nearest to the input that clients train.

    Raises:
        ValueError: If the adapter layers leave no layer for the emulator, or the model cannot be split.
    """
    name, layers = find_decoder_layers(model)
    if num_adapter_layers == ALL_LAYERS:
        return EmulatorSplit(name, len(layers), len(layers), ())
    bottom = num_adapter_layers_bottom
    num_emulator_layers = len(layers) - num_adapter_layers - bottom
    if num_emulator_layers < 1:
        and_bottom = f" and `num_adapter_layers_bottom` is {bottom}" if bottom else ""
        raise ValueError(
            f"`num_adapter_layers` is {num_adapter_layers}{and_bottom}, but {type(model).__name__} has {len(layers)} "
            f"decoder layers, so none is left for the emulator. Use at most {len(layers) - 1}"
            f"{' together' if bottom else ''}, or `num_adapter_layers=-1` to train a LoRA on all of them."
        )
    kept = tuple(bottom + index for index in kept_layer_indices(num_emulator_layers, drop_ratio))
    return EmulatorSplit(name, len(layers), num_adapter_layers, kept, bottom)


def build_emulator(model: PreTrainedModel, split: EmulatorSplit) -> PreTrainedModel:
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
    emulator = _twin(model, split, {id(model.config): config, **_subconfigs(model.config, config)})
    emulator.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    layers = emulator.get_submodule(split.layers_name)
    for position, layer in enumerate(layers):
        for module in layer.modules():
            for attribute in _INDEX_ATTRIBUTES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, position)
    _check_rebuild(emulator, split)
    return emulator


def keep_weight_layout(model: PreTrainedModel):
    """
    Keep bitsandbytes from repacking 4-bit weights at the first evaluation, as it does on CPUs with AVX512-BF16: packed
    weights hand no gradient on, and are damaged when they are saved.

    Raises:
        ValueError: If it has happened already.
    """
    for path, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"`model` is {type(model).__name__} whose `{path}` bitsandbytes has repacked for inference on this "
                    "CPU: the model has been evaluated, and cannot be trained any more. Pass a freshly loaded model."
                )
            module.support_avx512bf16_for_cpu = False


def _refuse_entangled_layers(model):
    config = model.config.get_text_config()
    for attribute in ("num_kv_shared_layers", "scale_attn_by_inverse_layer_idx"):
        if getattr(config, attribute, None):
            raise ValueError(
                f"`model` is {type(model).__name__} with `config.{attribute}={getattr(config, attribute)}`, so a layer "
                "depends on its position or on other layers, and dropping layers would change what the others compute."
            )
    for path, module in model.named_modules():
        if "forward" in vars(module):
            raise ValueError(
                f"`model` is {type(model).__name__} whose `{path or 'forward'}` was patched by another library (a "
                "trainer was built on it, or it is spread over devices). Pass a freshly loaded model."
            )


def _shrink_config(config: PretrainedConfig, split: EmulatorSplit) -> PretrainedConfig:
    """Copy `config` with fewer layers; every per-layer list in it (`layer_types`, ...) keeps the same layers."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    for name, value in list(vars(text_config).items()):
        per_layer = isinstance(value, (list, tuple)) and len(value) == split.num_layers
        if per_layer and not name.endswith("token_id") and name != "architectures":
            setattr(text_config, name, type(value)(value[i] for i in split.full_indices))
    text_config.num_hidden_layers = len(split.full_indices)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        skipped = getattr(getattr(config, "quantization_config", None), name, None)
        if skipped is not None:
            setattr(config.quantization_config, name, split.rename_kept(skipped))
    return config


def _subconfigs(old: PretrainedConfig, new: PretrainedConfig) -> dict[int, PretrainedConfig]:
    return {id(value): getattr(new, name) for name, value in vars(old).items() if isinstance(value, PretrainedConfig)}


def _twin(root: nn.Module, split: EmulatorSplit, configs: dict[int, PretrainedConfig]) -> nn.Module:
    """New module objects around the same tensors, without the dropped layers and without hooks."""
    twins: dict[int, nn.Module] = {}

    def twin(module: nn.Module, path: str) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        new = copy.copy(module)
        twins[id(module)] = new
        for name in ("_parameters", "_buffers"):
            setattr(new, name, vars(module)[name].copy())
        new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        for name in _HOOKS:
            setattr(new, name, OrderedDict())
        # transformers puts hooks on a model that was once asked for hidden states, and this mark; the twin gets its own.
        vars(new).pop("_output_capturing_hooks_installed", None)
        if id(vars(module).get("config")) in configs:
            new.config = configs[id(module.config)]
        children = list(module._modules.items())
        if path == split.layers_name:
            children = [(str(i), module[full]) for i, full in enumerate(split.full_indices)]
        new._modules = {
            name: child if child is None else twin(child, f"{path}.{name}" if path else name)
            for name, child in children
        }
        return new

    return twin(root, "")


def _check_rebuild(emulator: PreTrainedModel, split: EmulatorSplit):
    """Raise if a model built anew from the emulator's config would differ: the package could not be loaded."""
    config = type(emulator.config).from_dict(emulator.config.to_dict())
    config._attn_implementation = emulator.config._attn_implementation
    try:
        with torch.device("meta"):
            rebuilt = type(emulator)(config)
    except Exception as error:
        raise ValueError(
            f"`model` is {type(emulator).__name__}, whose config cannot describe the layers {split.full_indices}: "
            f"{error}. This architecture is not supported."
        ) from error
    quantized = getattr(emulator, "hf_quantizer", None) is not None
    ours, theirs = (dict(_layer_attributes(model, split, quantized)) for model in (emulator, rebuilt))
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if different:
        key = min(different)
        raise ValueError(
            f"`model` is {type(emulator).__name__}, in which `{key}` depends on the layer's position in a way that "
            f"`config` cannot describe ({ours.get(key)} in the full model, {theirs.get(key)} after loading), so "
            "dropping layers would change it. This architecture is not supported."
        )


def _layer_attributes(model: PreTrainedModel, split: EmulatorSplit, quantized: bool) -> Iterator[tuple[str, Any]]:
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
