"""Which modules of a decoder layer a LoRA can go on, and what PEFT and the model's own code make of their names."""

import copy
import inspect
import re
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..shared.processes import whole_shape
from ..shared.quantized import is_linear


_PROBE = LoraConfig()
# RWKV scales these weights in place when it is evaluated, and no LoRA on them.
_RESCALED = ("attention.output", "feed_forward.value")
# Of decoders that an encoder may stand beside. A causal LM does not run it.
_CROSS_ATTENTION = re.compile(r"(^|\.)(encoder_attn|crossattention|cross_attn)(\.|$)")


def usable_linears(model: PreTrainedModel, layer_name: str) -> list[str]:
    """Full names of the linear layers within a decoder layer that a LoRA can go on, in the order of the modules."""
    quantized = getattr(model, "hf_quantizer", None) is not None
    rescaled = bool(getattr(model.config, "rescale_every", 0))
    names = []
    for path, module in model.get_submodule(layer_name).named_modules():
        if _CROSS_ATTENTION.search(path) or (rescaled and path in _RESCALED):
            continue
        if (
            is_linear(module)
            and (quantized or _is_a_projection(module))
            and _peft_takes(model, path.rpartition(".")[2])
        ):
            names.append(f"{layer_name}.{path}")
    return names


def output_linear(model: PreTrainedModel, layer_name: str) -> str | None:
    """
    Full name of the linear whose output a decoder layer most likely adds to its own: of those with as many outputs as
    the hidden states have units, the one with the most inputs, which is the MLP's last as a rule.
    """
    hidden_size, found = model.config.get_text_config().hidden_size, {}
    for name in usable_linears(model, layer_name):
        if renamed_by_peft(model, name.rpartition(".")[2]) or weight_is_taken(model, name):
            continue
        module: Any = model.get_submodule(name)
        in_features, out_features = (
            (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        )
        if out_features == hidden_size:
            found[name] = in_features
    return max(reversed(found), key=found.__getitem__, default=None)


def _is_a_projection(module: nn.Module) -> bool:
    """Whether it does to shapes what a linear layer does: routers and grouped projections are subclasses that do not."""
    if isinstance(module, Conv1D) or type(module).forward is nn.Linear.forward:
        return True
    if not isinstance(module, nn.Linear):
        return False
    probe = copy.copy(module)
    shapes: dict[str, Any] = {
        name: parameter if parameter is None else torch.empty(whole_shape(parameter), device="meta")
        for name, parameter in module._parameters.items()
    }
    probe._parameters = shapes
    try:
        output = type(module).forward(probe, torch.empty(2, 3, module.in_features, device="meta"))
    except Exception:  # whatever a layer of another kind makes of it
        return False
    return isinstance(output, torch.Tensor) and output.shape == (2, 3, module.out_features)


def _peft_takes(model: PreTrainedModel, name: str) -> bool:
    """PEFT refuses projections of state-space layers whose weights are used without calling them."""
    try:
        _check_lora_target_modules_mamba(_PROBE, model, name)
    except ValueError:
        return False
    return True


def weight_is_taken(model: PreTrainedModel, name: str) -> bool:
    """
    Whether the module around a linear layer has code that takes its weight without calling it, as kernels of state-space
    layers do: with them, a LoRA on it would not be trained.
    """
    parent, _, own_name = name.rpartition(".")
    taken = re.compile(rf"self\.{own_name}\.weight\b(?!\.(dtype|device|shape|size))")
    for kind in type(model.get_submodule(parent)).__mro__:
        for method, function in vars(kind).items() if kind is not nn.Module else ():
            if inspect.isfunction(function) and "init" not in method and "reset" not in method:
                try:
                    if taken.search(inspect.getsource(function)):
                        return True
                except (OSError, TypeError):  # no source at hand
                    continue
    return False


def renamed_by_peft(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes `name` in `target_modules` for experts' weights of old, which are one parameter by now."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # a part of a fused weight
        return True
    return config.target_modules != {name}
