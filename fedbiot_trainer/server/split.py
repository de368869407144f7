"""Which decoder layers of the full model are where: found, chosen, and mapped by index."""

import math
import re
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ..config.settings import ALL_LAYERS
from ..shared.records import SplitRecord


@dataclass(frozen=True)
class LayerSplit:
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

    def record(self) -> SplitRecord:
        """What is reported of the split."""
        return SplitRecord(self.num_layers, list(self.kept), list(self.dropped), list(self.adapter_indices))

    def without_drops(self) -> "LayerSplit":
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
        positions = {full: position for position, full in enumerate(self.full_indices)}
        return list(self._rename(dict.fromkeys(name for name in names if not dropped.search(name)), positions))

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
    # 1 - 0.9 is a little less than 0.1.
    num_kept = max(1, math.floor((1 - drop_ratio) * num_emulator_layers + 0.5 + 1e-9))
    if num_kept == 1:
        return (0,)
    return tuple(math.floor(j * (num_emulator_layers - 1) / (num_kept - 1) + 0.5) for j in range(num_kept))


def check_full_model(model: PreTrainedModel):
    """
    Check that a model can be a full model: without LoRAs on it, and of a class that clients can load.

    Raises:
        ValueError: If it cannot.
    """
    name = type(model).__name__
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"`model` is {name} with a PEFT adapter on it, but the LoRAs of the federation are put on here. Pass the "
            "base model, or merge the adapter into it first with `merge_and_unload()`."
        )
    if "AutoModelForCausalLM" in (getattr(model.config, "auto_map", None) or {}):
        return
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())
    loaded = loaded if isinstance(loaded, tuple) else (loaded,)
    if not isinstance(model, loaded):
        raise ValueError(
            f"`model` is {name}, but `AutoModelForCausalLM` makes {loaded[0].__name__ if loaded else 'no model'} of its "
            f"{type(model.config).__name__}, so clients could not load the emulator. Pass a model that "
            "`AutoModelForCausalLM.from_pretrained` has loaded, e.g. the language model of a vision-language model."
        )


def layer_count_name(config: PreTrainedConfig) -> str:
    """The setting that tells how many layers the decoder has: in a family with encoders, its decoders have one."""
    names = ("decoder_layers", "num_decoder_layers")
    return next((name for name in names if getattr(config, name, None) is not None), "num_hidden_layers")


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """
    Find the stack of decoder layers: the outermost `ModuleList` as long as the config says the decoder is deep, within
    the decoder of text where a model has towers for images or sound as well.

    Raises:
        ValueError: If the model is an encoder-decoder, or has no such list or several.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"`model` is {name}, an encoder-decoder. FedBiOT splits decoder-only causal LMs.")
    config = model.config.get_text_config()
    num_layers = getattr(config, layer_count_name(config), None)
    decoder = model.get_decoder()
    decoder_name = next((path for path, module in model.named_modules() if module is decoder), "")
    inside = _outermost_lists(decoder, decoder_name, num_layers) if decoder_name else {}
    found = inside or _outermost_lists(model, "", num_layers)
    if len(found) > 1:  # towers that the decoder holds are further inside than its own layers
        depth = min(path.count(".") for path in found)
        found = {path: layers for path, layers in found.items() if path.count(".") == depth}
    if len(found) != 1:
        raise ValueError(
            f"`model` is {name}, in which {len(found)} lists of {num_layers} decoder layers were found "
            f"({', '.join(found) or 'none'}), so it cannot be split. It must be a causal LM that keeps its "
            "`config.num_hidden_layers` layers in one `nn.ModuleList`."
        )
    return next(iter(found.items()))


def _outermost_lists(root: nn.Module, name: str, length: int | None) -> dict[str, nn.ModuleList]:
    found: dict[str, nn.ModuleList] = {}
    for path, module in root.named_modules(prefix=name):
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == length and not nested:
            found[path] = module
    return found


def choose_split(
    model: PreTrainedModel, num_adapter_layers: int, drop_ratio: float, num_adapter_layers_bottom: int = 0
) -> LayerSplit:
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
        return LayerSplit(name, len(layers), len(layers), ())
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
    return LayerSplit(name, len(layers), num_adapter_layers, kept, bottom)
