import pytest
import torch
from conftest import assert_same_model, randomize, tiny_model
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from fedbiot_trainer.server.layer_dropping import drop_layers
from fedbiot_trainer.server.split import choose_split, find_decoder_layers, kept_layer_indices
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.wire.package import EmulatorPackage


pytestmark = pytest.mark.architectures


def test_kept_layers_over_all_sizes():
    for num_layers in range(1, 121):
        for percent in range(100):
            kept = kept_layer_indices(num_layers, percent / 100)
            assert len(kept) == max(1, ((100 - percent) * num_layers + 50) // 100)
            assert list(kept) == sorted(set(kept))
            assert kept[0] == 0
            assert kept[-1] == num_layers - 1 or len(kept) == 1
        assert kept_layer_indices(num_layers, 0.0) == tuple(range(num_layers))


@pytest.mark.parametrize("num_layers, ratio, kept", [(30, 0.5, 15), (30, 0.2, 24), (28, 0.2, 22), (1, 0.9, 1)])
def test_kept_layers_of_the_paper(num_layers, ratio, kept):
    assert len(kept_layer_indices(num_layers, ratio)) == kept


def test_no_drop_equals_the_full_model(any_model, batch):
    emulator = drop_layers(any_model, choose_split(any_model, 2, 0.0))
    assert torch.equal(emulator(**batch).logits, any_model(**batch).logits)


def test_emulator_shares_every_tensor(any_model):
    emulator = drop_layers(any_model, choose_split(any_model, 2, 0.5))
    full = {parameter.data_ptr() for parameter in any_model.parameters()}
    assert {parameter.data_ptr() for parameter in emulator.parameters()} < full


def test_building_leaves_the_full_model_alone(any_model, batch):
    before = any_model(**batch).logits
    config = any_model.config.to_dict()
    emulator = drop_layers(any_model, choose_split(any_model, 2, 0.5))
    assert torch.equal(any_model(**batch).logits, before)
    assert any_model.config.to_dict() == config
    assert not torch.allclose(emulator(**batch).logits, before, atol=1e-3)


def test_package_round_trip(any_model, batch, tmp_path):
    models = SplitModel(any_model, 2, 0.5, LoraConfig(r=4, target_modules="all-linear"))
    states = randomize(models.adap_emu, "client", "emulator")
    models.package(*states).save(tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.config.num_hidden_layers == len(models.split.full_indices)
    assert torch.equal(plain(**batch).logits, models.package_model(**batch).logits)

    with_loras = PeftModel.from_pretrained(plain, tmp_path / "client_lora", adapter_name="client")
    with_loras.load_adapter(tmp_path / "emulator_lora", adapter_name="emulator")
    with_loras.base_model.set_adapter(["client", "emulator"])
    for model in (models.adap_emu, EmulatorPackage.load(tmp_path).peft_model()):
        assert_same_model(model, with_loras, batch)


def test_generation_with_cache_equals_without(any_model, batch):
    models = SplitModel(any_model, 2, 0.5, LoraConfig(r=4, target_modules="all-linear"))
    randomize(models.adap_emu, "client", "emulator")
    prompt = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    for model in (models.package_model, models.adap_emu.eval()):
        options = {**prompt, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        cached = model.generate(**options, use_cache=True)
        assert torch.equal(cached, model.generate(**options, use_cache=False))
        assert cached.shape[1] == 22


def test_plug_in_then_extract_is_the_identity(any_model, batch):
    models = SplitModel(any_model, 2, 0.5, LoraConfig(r=4, target_modules="all-linear"))
    before = models.adap_fu(**batch).logits
    [state] = randomize(models.adap_emu, "client")
    models.plug_in(state)
    extracted = models.extract()
    assert extracted.keys() == state.keys()
    assert all(torch.equal(extracted[key], state[key]) for key in state)
    assert not torch.allclose(models.adap_fu(**batch).logits, before, atol=1e-3)


def test_plugged_in_lora_equals_the_emulator_when_nothing_is_dropped(any_model, batch):
    models = SplitModel(any_model, 2, 0.0, LoraConfig(r=4, target_modules="all-linear"))
    models.plug_in(*randomize(models.adap_emu, "client"))
    assert torch.equal(models.adap_fu(**batch).logits, models.adap_emu.eval()(**batch).logits)


def test_layer_types_follow_their_layers():
    model = tiny_model("gemma3_text", head_dim=8, sliding_window=6)
    split = choose_split(model, 2, 0.5)
    emulator = drop_layers(model, split)
    assert emulator.config.layer_types == [model.config.layer_types[i] for i in split.full_indices]
    assert [layer.self_attn.layer_idx for layer in emulator.model.layers] == [0, 1, 2, 3, 4]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(8))


def test_hooks_and_loras_stay_on_their_side(model, batch):
    calls = []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    emulator = drop_layers(model, choose_split(model, 2, 0.5))
    emulator(**batch)
    assert not calls


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_hidden_states_of_a_model_that_gave_some_before(model_type, batch):
    model = tiny_model(model_type)
    model(**batch, output_hidden_states=True)
    emulator = drop_layers(model, choose_split(model, 2, 0.5))
    assert len(emulator(**batch, output_hidden_states=True).hidden_states) == 6
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 9


@pytest.mark.parametrize("num_adapter_layers", [8, 9])
def test_adapter_layers_that_leave_no_emulator(model, num_adapter_layers):
    with pytest.raises(ValueError, match=f"`num_adapter_layers` is {num_adapter_layers}.*Use at most 7"):
        choose_split(model, num_adapter_layers, 0.5)


def test_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder-decoder"):
        find_decoder_layers(model)


def test_model_without_one_stack_of_layers_is_refused(model):
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="LlamaForCausalLM, in which 0 lists of 5 decoder layers"):
        find_decoder_layers(model)


def test_layers_that_depend_on_their_position_are_refused():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="GPT2LMHeadModel with `config.scale_attn_by_inverse_layer_idx=True`"):
        drop_layers(model, choose_split(model, 2, 0.5))


def test_layers_that_the_config_cannot_describe_are_refused():
    # DeepSeek-V3: the first layers are dense, the others are mixtures of experts.
    model = tiny_model(
        "deepseek_v3", first_k_dense_replace=3, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2
    )
    drop_layers(model, choose_split(model, 2, 0.0))
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM, in which .* depends on the layer's position"):
        drop_layers(model, choose_split(model, 2, 0.5))


def test_patched_model_is_refused(model):
    model.forward = model.forward
    with pytest.raises(ValueError, match="LlamaForCausalLM whose `forward` was patched"):
        drop_layers(model, choose_split(model, 2, 0.5))


def test_folder_that_is_no_package_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not an emulator package: it has no fedbiot.json"):
        EmulatorPackage.load(tmp_path)


def test_package_of_another_schema_is_refused(tmp_path):
    (tmp_path / "fedbiot.json").write_text('{"schema_version": 99, "num_adapter_layers": 2}')
    with pytest.raises(ValueError, match="has schema version 99, this library reads 1"):
        EmulatorPackage.load(tmp_path)


@pytest.mark.parametrize("num_layers, ratio, kept", [(15, 0.9, 2), (45, 0.3, 32), (30, 0.55, 14)])
def test_halves_are_rounded_up_whatever_floats_make_of_them(num_layers, ratio, kept):
    assert len(kept_layer_indices(num_layers, ratio)) == kept
