"""PEFT's LoRA layer with fewer passes over the activations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from .compat import has_forward_hooks
from .processes import is_sharded


class FusedLoraLinear(lora.Linear):
    """
    A PEFT LoRA layer around an `nn.Linear` that adds the low-rank product into the layer's output in place.

    PEFT makes the product, its scaled copy and the sum one after the other, each as large as the output, and keeps a
    float32 copy of the input for the LoRA's gradient. Here the output is written once and added to once, forward and
    backward. Parameters, names and all else are PEFT's, and so is the forward pass wherever this one does not apply:
    with active dropout, several or no LoRAs, merged, quantized or sharded weights.

    Attributes:
        folded (`torch.Tensor`, *optional*): `W + scaling B A`, `(out_features, in_features)`, to be used instead of the
            three; see [`folded_loras`].
    """

    folded: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        lora_name = next(name for name in self.active_adapters if name in self.lora_A)
        base = self.get_base_layer()
        weights: Sequence[torch.Tensor | None] = (
            base.weight,
            base.bias,
            self.lora_A[lora_name].weight,
            self.lora_B[lora_name].weight,
        )
        if self.folded is not None:
            return F.linear(x, self.folded, base.bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(dtype), [None if weight is None else weight.to(dtype) for weight in weights]
        elif any(weight is not None and weight.dtype != x.dtype for weight in weights):
            return super().forward(x)
        # Reshaped out here: a model may change in place what a function returns, but not a view made inside it.
        rows = _FusedLora.apply(x.flatten(0, -2), *weights, self.scaling[lora_name])
        return rows.view(*x.shape[:-1], -1)

    def _is_plain(self) -> bool:
        base = self.get_base_layer()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if type(base) is not nn.Linear or len(active) != 1 or self.disable_adapters or self.merged:
            return False
        (name,) = active
        if name in self.lora_variant or self.lora_B[name].bias is not None:
            return False
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return False
        weights = base.weight, self.lora_A[name].weight
        return not has_forward_hooks(base) and not any(map(is_sharded, weights))


class _FusedLora(torch.autograd.Function):
    """
    `x W^T + bias + scaling (x A^T) B^T` for a frozen `W` and rows `x`, `(num_tokens, in_features)`.

    The products with the rank as a side are written with it as the number of rows, `(r, num_tokens)`: some matrix
    libraries are several times slower with it as the number of columns.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, a, b, scaling):
        low = a @ rows.T
        output = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        output.addmm_(low.T, b.T, alpha=scaling)
        _, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_a else None, low if needs_b else None, weight, a, b)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, grad):
        rows, low, weight, a, b = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        if needs_x or needs_a:
            grad_low = (b.T @ grad.T).mul_(ctx.scaling)
        if needs_x:
            grad_x = (grad @ weight).addmm_(grad_low.T, a)
        if needs_a:
            grad_a = grad_low @ rows
        if needs_b:
            grad_b = (low @ grad).mul_(ctx.scaling).T
        return grad_x, None, None, grad_a, grad_b, None


def fuse_loras(model: PeftModel) -> PeftModel:
    """Give every LoRA layer of `model` around a plain linear layer the fused forward pass. Returns `model`."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = FusedLoraLinear
    return model


@contextmanager
def without_effect(model: PeftModel, lora_name: str) -> Iterator[None]:
    """Run the layers as if they did not have the LoRA `lora_name`. What is trainable stays so, unlike with PEFT's switch."""
    scalings = [m.scaling for m in model.modules() if isinstance(m, LoraLayer) and lora_name in m.scaling]
    strengths = [scaling[lora_name] for scaling in scalings]
    try:
        for scaling in scalings:
            scaling[lora_name] = 0.0
        yield
    finally:
        for scaling, strength in zip(scalings, strengths, strict=True):
            scaling[lora_name] = strength


@contextmanager
def folded_loras(model: PeftModel, lora_name: str) -> Iterator[None]:
    """
    Run the layers with the LoRA `lora_name`, which must not change in the block, as one product each. The frozen weights
    are not touched: the sums stand beside them. Only for float32, where a sum loses nothing of a small LoRA.
    """
    layers = [m for m in model.modules() if isinstance(m, FusedLoraLinear) and lora_name in m.lora_A]
    layers = [layer for layer in layers if type(layer.get_base_layer()) is nn.Linear]
    try:
        for layer in layers:  # whether the sum may be used is asked at each forward pass
            weight = layer.get_base_layer().weight
            a, b = layer.lora_A[lora_name].weight, layer.lora_B[lora_name].weight
            if weight.dtype == a.dtype == torch.float32:
                layer.folded = torch.addmm(weight.detach(), b.detach(), a.detach(), alpha=layer.scaling[lora_name])
        yield
    finally:
        for layer in layers:
            layer.folded = None
