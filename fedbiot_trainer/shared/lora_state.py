"""The client LoRA and the emulator LoRA of a model: put on, read, written, saved."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .lora_layers import fuse_loras
from .processes import gathered, release_whole


CLIENT = "client"
EMULATOR = "emulator"
LoraState = dict[str, torch.Tensor]


def add_loras(model: PreTrainedModel, client_config: LoraConfig, emulator_config: LoraConfig | None) -> PeftModel:
    """Both LoRAs on one model, both active, neither trainable. Where all layers are adapter layers there is only one."""
    model = get_peft_model(model, client_config, adapter_name=CLIENT)
    if emulator_config is not None:
        model.add_adapter(EMULATOR, emulator_config)
        model.base_model.set_adapter([CLIENT, EMULATOR])
    model.requires_grad_(False)
    return fuse_loras(model)


def set_trainable_lora(model: PeftModel, lora_name: str, freeze_a: bool = False):
    """Let only the LoRA `lora_name` have gradients, or only its matrices B."""
    release_whole(model)
    model.requires_grad_(False)
    for key, parameter in _lora_parameters(model, lora_name):
        parameter.requires_grad_(not (freeze_a and is_a(key)))


def is_a(key: str) -> bool:
    """Whether a key of a LoRA's state is of a matrix A, `(r, in_features)`. The others are B, `(out_features, r)`."""
    return ".lora_A." in key


def traveling(state: LoraState, freeze_a: bool = False, rank: int | None = None) -> LoraState:
    """
    The part of a client LoRA that goes over the wire.

    Args:
        state (`dict[str, torch.Tensor]`): The whole LoRA.
        freeze_a (`bool`, *optional*, defaults to `False`): Whether its matrices A are fixed, and known to both sides.
        rank (`int`, *optional*): Rank of the client's LoRA, if it is smaller: the first rows of A and columns of B.
    """
    part = {key: tensor for key, tensor in state.items() if not (freeze_a and is_a(key))}
    return {key: tensor[:rank] if is_a(key) else tensor[:, :rank] for key, tensor in part.items()}


def scaled(state: LoraState, factor: float) -> LoraState:
    """A LoRA of `factor` times the strength: in its matrices B, so that it needs no other configuration."""
    return {key: tensor if is_a(key) else factor * tensor for key, tensor in state.items()}


def arrived(part: LoraState, whole: LoraState) -> LoraState:
    """
    A LoRA of which a part has come: what [`traveling`] left out of matrices is zero, left-out matrices are those of
    `whole`. Rows of A and columns of B that are both zero have no gradient, so training leaves them so.
    """
    state = dict(whole)
    for key, tensor in part.items():
        (rows, columns), (all_rows, all_columns) = tensor.shape, whole[key].shape
        state[key] = F.pad(tensor, (0, all_columns - columns, 0, all_rows - rows))
    return state


def _lora_parameters(model: PeftModel, lora_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    infix = f".{lora_name}."
    for name, parameter in model.named_parameters():
        if "lora_" in name and infix in name:
            yield name.replace(infix, "."), parameter


def get_lora_state(model: PeftModel, lora_name: str) -> LoraState:
    """Copies of the LoRA's tensors on the CPU, under the keys of a saved PEFT folder."""
    release_whole(model)
    parameters = dict(_lora_parameters(model, lora_name))
    with gathered(parameters.values()) as tensors:
        return {key: whole.detach().to("cpu", copy=True) for key, whole in zip(parameters, tensors, strict=True)}


def set_lora_state(model: PeftModel, lora_name: str, state: LoraState):
    """
    Write a state from [`get_lora_state`] into the model.

    Raises:
        ValueError: If a key is missing or unknown, or a tensor has another shape.
    """
    release_whole(model)
    parameters = dict(_lora_parameters(model, lora_name))
    if parameters.keys() != state.keys():
        odd = sorted(parameters.keys() ^ state.keys())
        raise ValueError(
            f"The {lora_name} LoRA's tensors do not match the model's: {len(odd)} differ, first `{odd[0]}`."
        )
    with torch.no_grad(), gathered(parameters.values(), write=True) as tensors:
        for key, whole in zip(parameters, tensors, strict=True):
            if state[key].shape != whole.shape:  # `copy_` would broadcast
                raise ValueError(
                    f"The {lora_name} LoRA's tensor `{key}` is {tuple(state[key].shape)}, but the model's is {tuple(whole.shape)}."
                )
            whole.copy_(state[key])


def lora_factors(model: PeftModel, lora_name: str) -> tuple[list[tuple[nn.Parameter, nn.Parameter]], list[float]]:
    """All `(A, B)` of a LoRA, `(r, in_features)` and `(out_features, r)`, and their scalings."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and lora_name in m.lora_A]
    factors = [(layer.lora_A[lora_name].weight, layer.lora_B[lora_name].weight) for layer in layers]
    return factors, [layer.scaling[lora_name] for layer in layers]


def save_lora(folder: str | Path, config: LoraConfig, state: LoraState, base_model: str | None):
    """Write a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, weights)
    shutil.copymode(folder / "adapter_config.json", weights)  # which safetensors lets nobody else read


def load_lora(folder: str | Path) -> tuple[LoraConfig, LoraState]:
    """
    Read a PEFT folder.

    Raises:
        FileNotFoundError: If it is not one.
        ValueError: If it is damaged.
    """
    folder = Path(folder)
    try:
        json.loads((folder / "adapter_config.json").read_text())
        return LoraConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"The LoRA in '{folder}' cannot be read ({error}). Copy it again.") from error
