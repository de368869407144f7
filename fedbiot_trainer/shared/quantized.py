"""What is known of quantized weights: which can be trained through, saved, merged and counted."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .processes import whole_shape


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, quantized or not."""
    return isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__


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


def refuse_unsavable(model: PreTrainedModel):
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        raise ValueError(
            f"`model` is quantized with {quantizer.quantization_config.quant_method.value}, which transformers cannot "
            "save, so there would be no emulator to give to clients. Use bitsandbytes or torchao, or leave the full "
            "model as it is: clients can quantize the emulator when they load it."
        )


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


def refuse_merging_quantized(model: PreTrainedModel):
    """
    Check that LoRAs can be merged into a model's weights.

    Raises:
        ValueError: If they are quantized.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise ValueError(
            f"The model is quantized with {quantizer.quantization_config.quant_method.value}, and merging a LoRA would "
            "round the sum to few bits again: another model than the one that was trained. Use it with its LoRAs beside "
            "the weights, e.g. `EmulatorPackage.load(folder).peft_model()`, or merge them into unquantized weights."
        )


def num_weights(parameter):
    """Scalars of a parameter; bitsandbytes packs 4-bit ones and keeps the shape aside."""
    state = getattr(parameter, "quant_state", None)
    return (whole_shape(parameter) if state is None else state.shape).numel()
