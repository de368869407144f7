import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import HALF_THE_DIGITS, assert_as_exact, randomize, tiny_model
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from fedbiot_trainer.shared.lora_layers import FusedLoraLinear, _FusedLora, folded_loras, fuse_loras


def make_pair(dtype=torch.float32, frozen=False, **settings):
    """A model with PEFT's layers and the same with fused ones."""
    model = tiny_model(settings.pop("model_type", "qwen2"), dtype=dtype)
    plain = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings))
    randomize(plain, "default")
    if frozen:
        plain.requires_grad_(False)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_("layers.0." in name and "lora_" in name)
    return plain, fuse_loras(copy.deepcopy(plain))


def run(model, batch):
    model.zero_grad()
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    apply = _FusedLora.apply
    monkeypatch.setattr(_FusedLora, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


@pytest.mark.parametrize("frozen", [False, True], ids=["all LoRAs train", "only layer 0's"])
def test_fused_is_pefts_function(batch, fused_calls, frozen):
    plain, fused = make_pair(torch.float64, frozen=frozen, use_rslora=True)
    (expected, expected_grads), (logits, grads) = run(plain, batch), run(fused, batch)
    assert len(fused_calls) == 8 * 7
    assert grads.keys() == expected_grads.keys() and len(grads) == (7 * 2 if frozen else 8 * 7 * 2)
    assert torch.allclose(logits, expected, rtol=0, atol=HALF_THE_DIGITS)
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() < HALF_THE_DIGITS * grad.norm(), name


@dataclass
class Rounded:
    """
    Numbers, as float64, and how far from them those can be that were computed in `dtype`: what is computed is rounded to
    the nearest, by half of an epsilon at most, and the `n` terms of a product are added up in float32.
    """

    value: torch.Tensor
    dtype: torch.dtype
    error: torch.Tensor | float = 0.0

    def __matmul__(self, other):
        size, other_size = self.value.abs() + self.error, other.value.abs() + other.error
        error = size @ other_size - self.value.abs() @ other.value.abs()
        terms = self.value.shape[-1] * torch.finfo(torch.float32).eps * (size @ other_size)
        return Rounded(self.value @ other.value, self.dtype, error + terms).rounded()

    def __add__(self, other):
        return Rounded(self.value + other.value, self.dtype, self.error + other.error).rounded()

    def __mul__(self, factor):
        return Rounded(self.value * factor, self.dtype, self.error * abs(factor)).rounded()

    def rounded(self):
        half = torch.finfo(self.dtype).eps / 2
        return Rounded(self.value, self.dtype, self.error + half * (self.value.abs() + self.error))

    @property
    def T(self):  # noqa: N802
        return Rounded(self.value.T, self.dtype, self.error.T if isinstance(self.error, torch.Tensor) else self.error)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_a_fused_layer_rounds_no_more_than_its_formula(precision, fused_calls):
    torch.manual_seed(0)
    lora_config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = fuse_loras(get_peft_model(nn.Sequential(nn.Linear(48, 40)), lora_config))
    layer = model.base_model.model[0]
    own = torch.bfloat16 if precision == "bf16" else torch.float32
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model.to(own)
    x, grad = torch.randn(30, 48, dtype=own, requires_grad=True), torch.randn(30, 40, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        output = layer(x)
    output.backward(grad)
    assert len(fused_calls) == 1 and output.dtype == dtype

    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    given = (x, grad, layer.base_layer.weight, layer.base_layer.bias, a, b)
    rows, above, weight, bias, down, up = (Rounded(tensor.detach().to(dtype).double(), dtype) for tensor in given)
    low, low_grad = rows @ down.T, (above @ up) * scaling
    for name, result, expected in (
        ("output", output, rows @ weight.T + bias + (low @ up.T) * scaling),
        ("x", x.grad, above @ weight + low_grad @ down),
        ("A", a.grad, low_grad.T @ rows),
        ("B", b.grad, (above.T @ low) * scaling),
    ):
        assert ((result.double() - expected.value).abs() <= expected.error).all(), name
    assert a.grad.dtype == b.grad.dtype == x.grad.dtype == own


def test_every_tensor_and_name_is_pefts():
    plain, fused = make_pair()
    assert {type(m) for m in fused.modules() if isinstance(m, lora.LoraLayer)} == {FusedLoraLinear}
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_dropout_is_pefts(batch, fused_calls):
    plain, fused = make_pair(lora_dropout=0.5)
    logits = []
    for model in (plain, fused):
        torch.manual_seed(7)
        logits.append(model.train()(**batch).logits)
    assert torch.equal(*logits)
    assert fused_calls == []
    fused.eval()(**batch)
    assert len(fused_calls) == 8 * 7


@pytest.mark.parametrize("change", ["disabled", "merged", "two", "hooked", "mixed dtypes", "conv1d"])
def test_where_it_does_not_apply_the_forward_is_pefts(batch, fused_calls, change):
    plain, fused = make_pair(torch.bfloat16 if change == "mixed dtypes" else torch.float32,
                             model_type="gpt2" if change == "conv1d" else "qwen2")  # fmt: skip
    logits = []
    for model in (plain.eval(), fused.eval()):
        if change == "disabled":
            model.base_model.disable_adapter_layers()
        elif change == "merged":
            model.merge_adapter()
        elif change == "two":
            torch.manual_seed(0)
            model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            model.base_model.set_adapter(["default", "second"])
        elif change == "hooked":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(lambda *args: None)
        logits.append(model(**batch).logits)
    assert torch.equal(*logits)
    assert fused_calls == []


def test_folded_lora_computes_the_same(batch, fused_calls):
    _, model = make_pair(use_rslora=True)
    model.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}

    def forward_and_backward(model):
        states = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        logits = model(inputs_embeds=states, attention_mask=batch["attention_mask"]).logits
        return logits, torch.autograd.grad(logits.square().sum(), states)[0]

    exact, expected = forward_and_backward(copy.deepcopy(model).double()), forward_and_backward(model)
    fused_calls.clear()
    with folded_loras(model, "default"):
        results = forward_and_backward(model)
    assert fused_calls == []
    for tensors in zip(results, expected, exact, strict=True):
        assert_as_exact(*tensors)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    forward_and_backward(model)
    assert len(fused_calls) == 8 * 7


def test_bf16_weights_are_not_folded(batch):
    _, model = make_pair(torch.bfloat16)
    expected = model(**batch).logits
    with folded_loras(model, "default"):
        assert all(layer.folded is None for layer in model.modules() if isinstance(layer, FusedLoraLinear))
        assert torch.equal(model(**batch).logits, expected)


def test_output_may_be_changed_in_place():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(r=2, target_modules=["0"]))
    layer = fuse_loras(model).base_model.model[0]
    x = torch.randn(2, 3, 6, requires_grad=True)
    output = layer(x)
    output.add_(1).sum().backward()
    changed, x.grad = x.grad, None
    (layer(x) + 1).sum().backward()
    assert torch.equal(changed, x.grad)
