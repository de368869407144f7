import inspect

import pytest
import torch
from conftest import HALF_THE_DIGITS, sums, tiny_model
from peft import LoraConfig
from torch import nn

from fedbiot_trainer import EmulatorAlignmentTrainer
from fedbiot_trainer.server.capture import run_adapter_layers, run_full_model
from fedbiot_trainer.server.split_check import check_split
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.server.wiring import Wiring


CPU = torch.device("cpu")
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
SEVERAL_VALUES = {
    "bamba": ({**MAMBA, "attn_layer_indices": [3]}, ["in_proj"]),
    "zaya": ({"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}, None),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 64}, None),
}


@pytest.fixture(params=SEVERAL_VALUES)
def of_several_values(request):
    settings, targets = SEVERAL_VALUES[request.param]
    model = tiny_model(request.param, dtype=torch.float64, **settings)
    model.config._experts_implementation = "eager"  # the grouped products of experts have no float64
    return model, LoraConfig(r=4, target_modules=targets)


def test_adapter_layers_run_from_what_enters_them(of_several_values, batch):
    model, lora = of_several_values
    models = SplitModel(model, 2, 0.5, lora)
    check_split(models, CPU)
    expected = run_full_model(models, batch)
    last = run_adapter_layers(models, batch, expected.states).last
    mask = batch["attention_mask"].bool()
    assert torch.allclose(last[mask], expected.last[mask], rtol=0, atol=HALF_THE_DIGITS)


def test_cached_and_online_teacher_agree(of_several_values, make_args, tokenizer):
    model, lora = of_several_values
    losses = []
    for teacher in ("cached", "online"):
        args = make_args(initial_alignment_steps=3, teacher=teacher)
        torch.manual_seed(0)
        trainer = EmulatorAlignmentTrainer(model, args, sums(20, 30), lora, processing_class=tokenizer)
        trainer.train()
        losses.append(trainer.step_metrics["alignment_l2"] + trainer.step_metrics["alignment_kl"])
    assert losses[0] == pytest.approx(losses[1], rel=torch.finfo(torch.float32).eps)  # in which they are summed


class Layer(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, hidden, state=None, other=None):
        return {0: hidden + 1, 2: (hidden + 1, None), 3: (hidden + 1, hidden[..., :3] * 2, [other])}[self.form]


class Decoder(nn.Module):
    def __init__(self, forms):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, forms))

    def forward(self, hidden):
        state = None
        for layer in self.layers:
            values = layer(hidden, state=state)
            hidden, state = (values, None) if isinstance(values, torch.Tensor) else values[:2]
        return hidden


@pytest.mark.parametrize(
    "form, expected",
    [
        (0, Wiring((0,), True)),
        (2, Wiring((0, None), False)),
        (3, Wiring((0, "state", None), False, (("state", 3),))),
    ],
)
def test_wiring_is_seen(form, expected):
    model = Decoder([form] * 3)
    wiring = Wiring.of(model, "layers", lambda: model(torch.randn(2, 4, 6)))
    assert wiring == expected
    hidden, state = torch.randn(2, 4, 6), torch.randn(2, 4, 3)
    passed = wiring.pass_through(hidden, state=state, other=1)
    assert passed is hidden if form == 0 else (passed[0] is hidden and len(passed) == form)
    if form == 3:
        assert passed[1] is state
        args, kwargs = wiring.replace((hidden,), {"state": None}, torch.cat([hidden, state], -1))
        assert torch.equal(args[0], hidden)
        assert torch.equal(kwargs["state"], state)


def test_layers_of_several_forms_are_refused():
    model = Decoder([0, 2])
    with pytest.raises(
        ValueError, match="`model` is Decoder, whose decoder layers return different numbers of values"
    ):
        Wiring.of(model, "layers", lambda: model(torch.randn(2, 4, 6)))


@pytest.fixture
def models():
    return SplitModel(tiny_model(), 2, 0.5, LoraConfig(r=4, target_modules=["q_proj"]))


def layers_of(peft_model):
    return peft_model.get_base_model().model.layers


def patch_forward(monkeypatch, layer, forward):
    monkeypatch.setattr(type(layer), "forward", forward)


def test_a_model_whose_layers_know_their_place_is_refused(models, monkeypatch):
    original = type(layers_of(models.adap_emu)[0]).forward
    patch_forward(
        monkeypatch,
        layers_of(models.adap_emu)[0],
        lambda self, hidden, **kwargs: original(self, hidden, **kwargs) * (1 + self.self_attn.layer_idx),
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM, in which dropping layers changes what the others compute"):
        check_split(models, CPU)
    check_split(models, CPU, compare_full=False)


def test_a_model_whose_layers_hand_on_more_than_vectors_is_refused_for_the_cached_teacher(models, monkeypatch):
    original, shared = type(layers_of(models.adap_emu)[0]).forward, {}

    def forward(self, hidden, **kwargs):
        shared[0] = 1 if self.self_attn.layer_idx == 0 else shared.get(0, 0) + 1
        return original(self, hidden, **kwargs) * shared[0]

    monkeypatch.setattr(type(layers_of(models.adap_emu)[0]), "forward", forward)
    with pytest.raises(ValueError, match="LlamaForCausalLM, whose adapter layers need more .* `teacher='online'`"):
        shared.clear()
        check_split(models, CPU, compare_full=False)
    check_split(models, CPU, compare_full=False, cached=False)


def test_hidden_states_of_another_shape_are_refused(models, monkeypatch):
    monkeypatch.setattr(type(models.adap_emu.config), "hidden_size", 31, raising=False)
    monkeypatch.setitem(vars(models.adap_emu.config), "hidden_size", 31)
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(2, 8, 32\) enters the adapter layers for \(2, 8\) tokens"
    ):
        check_split(models, CPU)


def test_a_lora_that_is_never_called_is_refused(models, monkeypatch):
    attention = type(layers_of(models.adap_emu)[0].self_attn)
    original = attention.forward

    def forward(self, *args, **kwargs):
        if not self.training:
            return original(self, *args, **kwargs)
        wrapped, self.q_proj = self.q_proj, self.q_proj.base_layer  # as a fused kernel that takes the weight
        try:
            return original(self, *args, **kwargs)
        finally:
            self.q_proj = wrapped

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(ValueError, match="`target_modules` has q_proj, but LlamaForCausalLM takes the weights"):
        check_split(models, CPU)


def test_the_check_leaves_no_trace(models):
    before, training = torch.get_rng_state(), models.adap_emu.training
    parameters = {name: tensor.clone() for name, tensor in models.adap_emu.named_parameters()}
    check_split(models, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert models.adap_emu.training == training
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in models.adap_emu.named_parameters())
    assert not any("forward" in vars(module) for module in models.adap_fu.modules())


def test_server_without_alignment_checks_as_well(make_runner, monkeypatch):
    seen = []
    monkeypatch.setattr("fedbiot_trainer.server.server.check_split", lambda models, device, **how: seen.append(how))
    make_runner(initial_alignment_steps=0, alignment_steps=0)
    assert seen == [{"cached": False}]


def test_a_decoder_that_cannot_run_without_a_layer_is_named(models, monkeypatch):
    monkeypatch.setattr(Wiring, "pass_through", lambda self, *args, **kwargs: None)
    with pytest.raises(ValueError, match="LlamaForCausalLM, whose decoder cannot run without some of its layers"):
        check_split(models, CPU)


def test_projections_of_state_space_layers_are_left_out_by_default():
    models = SplitModel(tiny_model("mamba", state_size=4), 2, 0.5)
    check_split(models, CPU)
    assert models.adap_emu.peft_config["client"].target_modules == ["in_proj"]


def test_projection_whose_weight_is_taken_is_refused():
    model = tiny_model("mamba", state_size=4)
    if "self.dt_proj(" in inspect.getsource(type(model.backbone.layers[0].mixer)):
        pytest.skip("this transformers calls it on a CPU")
    explicit = SplitModel(model, 2, 0.5, LoraConfig(target_modules=["in_proj", "dt_proj"]))
    with pytest.raises(ValueError, match="`target_modules` has dt_proj, but MambaForCausalLM takes the weights"):
        check_split(explicit, CPU)


def test_a_hybrid_whose_emulator_has_no_attention_is_refused():
    # Its cache could not count tokens: no client could generate.
    models = SplitModel(
        tiny_model("bamba", **MAMBA, attn_layer_indices=[1]), 2, 0.5, LoraConfig(target_modules=["in_proj"])
    )
    with pytest.raises(
        ValueError, match="BambaForCausalLM, whose decoder cannot run .* another `emulator_drop_ratio`"
    ):
        check_split(models, CPU)
