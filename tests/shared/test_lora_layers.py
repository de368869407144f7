import copy

import pytest
import torch
from conftest import assert_as_exact, randomize, tiny_model
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


def distance(results, expected):
    """Relative errors of the logits and of the gradients, of these the root mean square."""
    (logits, grads), (expected_logits, expected_grads) = results, expected
    assert grads.keys() == expected_grads.keys()
    errors = [(grads[name].double() - grad).norm() / grad.norm() for name, grad in expected_grads.items()]
    return (logits.double() - expected_logits).norm() / expected_logits.norm(), torch.stack(
        errors
    ).square().mean().sqrt()


@pytest.mark.parametrize("frozen", [False, True], ids=["all LoRAs train", "only layer 0's"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_fused_is_as_exact_as_peft(batch, fused_calls, frozen, precision):
    plain, fused = make_pair(frozen=frozen, use_rslora=True)
    if precision == "bf16":
        plain, fused = plain.bfloat16(), fused.bfloat16()
    exact = run(copy.deepcopy(plain).double(), batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        theirs, ours = run(plain, batch), run(fused, batch)
    assert len(fused_calls) == 8 * 7
    assert len(ours[1]) == (7 * 2 if frozen else 8 * 7 * 2)
    assert all(grad.dtype == theirs[1][name].dtype for name, grad in ours[1].items())
    for our_error, their_error in zip(distance(ours, exact), distance(theirs, exact), strict=True):
        assert our_error < 4 * their_error  # see `assert_as_exact`


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
