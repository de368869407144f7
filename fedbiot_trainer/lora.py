"""The client LoRA and the emulator LoRA: where they go, how their weights are read, written and saved."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .emulator import EmulatorSplit, build_emulator, is_linear, split_layers
from .fused_lora import fuse_loras
from .sharding import gathered, release_whole


CLIENT = "client"
EMULATOR = "emulator"

LoraState = dict[str, torch.Tensor]

DEFAULT_LORA = {"r": 8, "lora_alpha": 16}


class SplitModel:
    """
    A full model and its emulator, with the LoRAs of FedBiOT on them. All frozen tensors are shared.

    Attributes:
        split ([`EmulatorSplit`]): Which layers are where.
        package_model (`PreTrainedModel`): Emulator + adapter layers without any LoRA, as clients receive it.
        emulator (`PeftModel`): Emulator + adapter layers with the client LoRA and the emulator LoRA active.
        full (`PeftModel`): The full model with the client LoRA at the full model's layer indices.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_adapter_layers: int,
        emulator_drop_ratio: float,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        num_adapter_layers_bottom: int = 0,
    ):
        _refuse_unsavable(model)
        self.split = split_layers(model, num_adapter_layers, emulator_drop_ratio, num_adapter_layers_bottom)
        peft_config = peft_config or LoraConfig(**DEFAULT_LORA)
        client_config = resolve_peft_config(peft_config, model, self.split, self.split.adapter_indices)
        emulator_config = None
        if self.split.kept:
            emulator_config = emulator_peft_config or peft_config
            emulator_config = resolve_peft_config(emulator_config, model, self.split, self.split.kept)
            # Alignment is a regression on fixed targets, and clients run the emulator LoRA frozen: no dropout in either.
            positions = self.split.emulator_positions
            emulator_config = place_lora(emulator_config, self.split, positions, lora_dropout=0.0)
        self.package_model = build_emulator(model, self.split)
        self.emulator = add_loras(
            build_emulator(model, self.split),
            place_lora(client_config, self.split, self.split.adapter_positions),
            emulator_config,
        )
        self.full = fuse_loras(
            get_peft_model(
                build_emulator(model, self.split.without_drops()),
                place_lora(client_config, self.split, self.split.adapter_indices),
                adapter_name=CLIENT,
            )
        )
        self.full.requires_grad_(False)
        self.full.eval()
        self._offloaded = False
        self.plug_in(get_lora_state(self.emulator, CLIENT))

    def move(self, device: torch.device, offload: bool = False):
        """
        Move the models to a device.

        Args:
            device (`torch.device`): Where everything that clients have as well goes.
            offload (`bool`, *optional*, defaults to `False`): Whether the layers that only the full model has stay on
                the CPU. It can only run within [`whole_on`] then.
        """
        self._offloaded = offload
        layers = self.full.get_base_model().get_submodule(self.split.layers_name)
        dropped = [layers[i] for i in self.split.dropped]
        if offload:
            inside = {id(module) for layer in dropped for module in layer.modules()}
            # Shared `Parameter` objects are moved in place, so `full` sees it. Buffers are not shared.
            self.emulator.to(device)
            for module in self.full.modules():
                if id(module) not in inside:
                    for name, buffer in module._buffers.items():
                        module._buffers[name] = None if buffer is None else buffer.to(device)
                    for parameter in module._parameters.values():
                        if parameter is not None:
                            parameter.data = parameter.data.to(device)
        else:
            self.full.to(device)

    @contextmanager
    def whole_on(self, device: torch.device) -> Iterator[None]:
        """Have the whole full model on `device` in the block."""
        layers = self.full.get_base_model().get_submodule(self.split.layers_name)
        dropped = [layers[i] for i in self.split.dropped] if self._offloaded else []
        try:
            for layer in dropped:
                layer.to(device)
            yield
        finally:
            for layer in dropped:
                layer.to("cpu")

    def plug_in(self, client_lora: LoraState):
        """Put a client LoRA (keys of the emulator) into the full model."""
        set_lora_state(self.full, CLIENT, self.split.to_full(client_lora))

    def extract(self) -> LoraState:
        """The client LoRA in the full model, with the emulator's keys. Inverse of [`plug_in`]."""
        return self.split.to_emulator(get_lora_state(self.full, CLIENT))


def _refuse_unsavable(model: PreTrainedModel):
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        raise ValueError(
            f"`model` is quantized with {quantizer.quantization_config.quant_method.value}, which transformers cannot "
            "save, so there would be no emulator to give to clients. Use bitsandbytes or torchao, or leave the full "
            "model as it is: clients can quantize the emulator when they load it."
        )


def with_rank(config: LoraConfig | None, r: int) -> LoraConfig:
    """A copy of `config` with another rank and the same `lora_alpha / r`."""
    config = copy.deepcopy(config or LoraConfig(**DEFAULT_LORA))
    config.lora_alpha, config.r = config.lora_alpha * r / config.r, r
    return config


def resolve_peft_config(
    config: LoraConfig, model: PreTrainedModel, split: EmulatorSplit, layers: tuple[int, ...]
) -> LoraConfig:
    """
    Check a user's LoRA configuration and resolve its target modules to names inside a decoder layer.

    Args:
        config ([`~peft.LoraConfig`]): `target_modules` may be `None` (PEFT's choice for the architecture, else all
            linear layers), `"all-linear"`, a list of names or a regular expression.
        model (`PreTrainedModel`): The full model.
        split ([`EmulatorSplit`]): Its split.
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


def place_lora(config: LoraConfig, split: EmulatorSplit, layers: tuple[int, ...], **changes) -> LoraConfig:
    """A copy of `config` for the decoder layers at `layers`."""
    config = copy.deepcopy(config)
    config.layers_to_transform = list(layers)
    config.layers_pattern = [split.layers_name.rpartition(".")[2]]
    config.task_type = "CAUSAL_LM"
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def add_loras(emulator: PreTrainedModel, client_config: LoraConfig, emulator_config: LoraConfig | None) -> PeftModel:
    """Both LoRAs on one model, both active, neither trainable. Where all layers are adapter layers there is only one."""
    model = get_peft_model(emulator, client_config, adapter_name=CLIENT)
    if emulator_config is not None:
        model.add_adapter(EMULATOR, emulator_config)
        model.base_model.set_adapter([CLIENT, EMULATOR])
    model.requires_grad_(False)
    return fuse_loras(model)


def set_trainable_lora(model: PeftModel, adapter: str):
    """Let only the LoRA `adapter` have gradients."""
    release_whole(model)
    model.requires_grad_(False)
    for _, parameter in _lora_parameters(model, adapter):
        parameter.requires_grad_(True)


def _lora_parameters(model: PeftModel, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    infix = f".{adapter}."
    for name, parameter in model.named_parameters():
        if "lora_" in name and infix in name:
            yield name.replace(infix, "."), parameter


def get_lora_state(model: PeftModel, adapter: str) -> LoraState:
    """Copies of the LoRA's tensors on the CPU, under the keys of a saved PEFT folder."""
    release_whole(model)
    parameters = dict(_lora_parameters(model, adapter))
    with gathered(parameters.values()) as tensors:
        return {key: whole.detach().to("cpu", copy=True) for key, whole in zip(parameters, tensors, strict=True)}


def set_lora_state(model: PeftModel, adapter: str, state: LoraState):
    """
    Write a state from [`get_lora_state`] into the model.

    Raises:
        ValueError: If a key is missing or unknown.
    """
    release_whole(model)
    parameters = dict(_lora_parameters(model, adapter))
    if parameters.keys() != state.keys():
        odd = sorted(parameters.keys() ^ state.keys())
        raise ValueError(
            f"The {adapter} LoRA's tensors do not match the model's: {len(odd)} differ, first `{odd[0]}`."
        )
    with torch.no_grad(), gathered(parameters.values(), write=True) as tensors:
        for key, whole in zip(parameters, tensors, strict=True):
            whole.copy_(state[key])


def check_gradient(model: PeftModel):
    """
    Check that the quantized layers under the LoRAs hand the gradient on: quantization for inference may cut it off
    without an error.

    A layer `W` gives its input the gradient `W^T v` for the gradient `v` of its output. With `v = W d`, the product of
    the former with `d` must be `|W d|^2`, up to rounding.

    Raises:
        ValueError: If they do not.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    lora = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer = lora.get_base_layer()
    values = torch.randn(2, 8, lora.in_features, generator=torch.Generator().manual_seed(0))
    x, d = values.to(layer.weight.device, model.get_input_embeddings().weight.dtype)
    x.requires_grad_(True)
    with torch.no_grad():
        v = (layer(d) - layer(-d)) / 2  # without the bias
    with torch.enable_grad():
        y = layer(x)
    gradient = torch.autograd.grad(y, x, v)[0] if y.requires_grad else torch.zeros_like(x)
    share = ((gradient.float() * d.float()).sum() / v.float().pow(2).sum()).item()
    if not 0.5 < share < 1.5:
        method = model.hf_quantizer.quantization_config.quant_method.value
        raise ValueError(
            f"`model` is quantized with {method} so that its layers do not hand gradients on to the LoRAs below them "
            f"(measured: {share:.0%} of the gradient). Quantize only the weights, e.g. with bitsandbytes or torchao's "
            "`Int8WeightOnlyConfig`."
        )


def lora_factors(model: PeftModel, adapter: str) -> tuple[list[tuple[nn.Parameter, nn.Parameter]], list[float]]:
    """All `(A, B)` of a LoRA, `(r, in_features)` and `(out_features, r)`, and their scalings."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]
    factors = [(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for layer in layers]
    return factors, [layer.scaling[adapter] for layer in layers]


def save_lora(folder: str | Path, config: LoraConfig, state: LoraState, base_model: str | None):
    """Write a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "adapter_model.safetensors")


def load_lora(folder: str | Path) -> tuple[LoraConfig, LoraState]:
    """
    Read a PEFT folder.

    Raises:
        FileNotFoundError: If it is not one.
    """
    folder = Path(folder)
    json.loads((folder / "adapter_config.json").read_text())
    return LoraConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
