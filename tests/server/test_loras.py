import copy

import pytest
import torch
from conftest import assert_same_model, random_lora, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.lora_state import (
    get_lora_state,
    load_lora,
    lora_factors,
    save_lora,
    set_lora_state,
    set_trainable_lora,
)


@pytest.fixture
def models(model):
    return SplitModel(model, 2, 0.5, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def test_state_has_the_keys_and_values_of_peft(models):
    for adapter in ("client", "emulator"):
        ours = get_lora_state(models.adap_emu, adapter)
        theirs = get_peft_model_state_dict(models.adap_emu, adapter_name=adapter)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_loras_are_on_their_layers(models):
    layers = {
        name: {int(key.split("layers.")[1].split(".")[0]) for key in get_lora_state(models.adap_emu, name)}
        for name in ("client", "emulator")
    }
    assert layers == {"client": {3, 4}, "emulator": {0, 1, 2}}
    full = {int(key.split("layers.")[1].split(".")[0]) for key in get_lora_state(models.adap_fu, "client")}
    assert full == {6, 7}


def test_only_one_lora_is_trainable(models):
    for adapter in ("client", "emulator"):
        set_trainable_lora(models.adap_emu, adapter)
        trainable = {name for name, parameter in models.adap_emu.named_parameters() if parameter.requires_grad}
        assert trainable
        assert all(f".{adapter}." in name for name in trainable)


def test_written_state_is_read_back(models):
    state = random_lora(get_lora_state(models.adap_emu, "client"))
    set_lora_state(models.adap_emu, "client", state)
    read = get_lora_state(models.adap_emu, "client")
    assert all(torch.equal(read[key], state[key]) for key in state)
    with pytest.raises(ValueError, match="The client LoRA's tensors do not match the model's: 1 differ"):
        set_lora_state(models.adap_emu, "client", dict(list(state.items())[1:]))


def test_factors_give_the_update_of_the_weights(models, batch):
    factors, scalings = lora_factors(models.adap_emu, "client")
    assert len(factors) == 2 * 7
    assert all(a.shape[0] == b.shape[1] == 4 for a, b in factors)
    assert set(scalings) == {2.0}


def test_saved_folder_loads_with_peft_alone(models, model, tmp_path, batch):
    state = random_lora(get_lora_state(models.adap_emu, "client"))
    models.plug_in(state)
    save_lora(tmp_path, models.adap_fu.peft_config["client"], models.split.to_full(state), "some/model")
    config, loaded = load_lora(tmp_path)
    assert config.base_model_name_or_path == "some/model"
    assert loaded.keys() == models.split.to_full(state).keys()
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_same_model(models.adap_fu, plain, batch)
    merged = copy.deepcopy(plain).merge_and_unload()
    assert_same_model(merged, plain, batch)


@pytest.mark.parametrize(
    "targets, expected",
    [
        (None, {"q_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "up_proj"], {"q_proj", "up_proj"}),
        (r".*self_attn\.[kq]_proj", {"q_proj", "k_proj"}),
    ],
    ids=["default", "all-linear", "names", "regex"],
)
def test_target_modules_are_resolved(model, targets, expected):
    models = SplitModel(model, 2, 0.5, LoraConfig(target_modules=targets))
    assert set(models.adap_emu.peft_config["client"].target_modules) == expected


def test_default_targets_of_an_architecture_that_peft_does_not_know(monkeypatch):
    monkeypatch.setattr("fedbiot_trainer.server.lora_placement.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {})
    models = SplitModel(tiny_model("gpt_neox"), 2, 0.5, LoraConfig())
    expected = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert set(models.adap_emu.peft_config["client"].target_modules) == expected


def test_emulator_lora_has_its_own_rank_and_no_dropout(model, make_args):
    models = SplitModel.from_config(
        model, make_args(emulator_lora_r=6), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
    )
    client, emulator = models.adap_emu.peft_config["client"], models.adap_emu.peft_config["emulator"]
    assert (client.r, client.lora_alpha, client.lora_dropout) == (4, 8, 0.1)
    assert (emulator.r, emulator.lora_alpha, emulator.lora_dropout) == (6, 12, 0.0)


def test_half_precision_base_keeps_full_precision_loras():
    models = SplitModel(tiny_model(dtype=torch.bfloat16), 2, 0.5)
    assert {tensor.dtype for tensor in get_lora_state(models.adap_emu, "client").values()} == {torch.float32}


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"target_modules": ["query"]},
            r"`target_modules` is \['query'\], which matches no linear layer .* self_attn.q_proj",
        ),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is .* whole modules would leave the server"),
        (
            {"layers_to_transform": [0], "target_modules": ["q_proj"]},
            "`layers_to_transform` is .* `num_adapter_layers` decides",
        ),
        ({"use_dora": True}, "`use_dora` is True .* the proximal term"),
        ({"bias": "all"}, "`bias` is 'all' .* biases are frozen"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa' .* must start as a zero update"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices` is .* belong to the frozen emulator"),
    ],
)
def test_lora_that_cannot_be_federated(model, settings, message):
    with pytest.raises(ValueError, match=message):
        SplitModel(model, 2, 0.5, LoraConfig(**settings))


def test_other_peft_methods_are_refused(model):
    from peft import PrefixTuningConfig

    with pytest.raises(TypeError, match="`peft_config` must be a `peft.LoraConfig`, got PrefixTuningConfig"):
        SplitModel(model, 2, 0.5, PrefixTuningConfig())


def test_a_rank_for_the_emulator_and_ranks_of_single_modules(model, make_args):
    lora = LoraConfig(r=4, target_modules="all-linear", rank_pattern={"down_proj": 2})
    with pytest.raises(ValueError, match="`emulator_lora_r` is 6, but `rank_pattern` gives single modules their own"):
        SplitModel.from_config(model, make_args(emulator_lora_r=6), lora)
