import pytest
import torch
from conftest import HALF_THE_DIGITS, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig

from fedbiot_trainer.server.layer_dropping import drop_layers
from fedbiot_trainer.server.split import check_full_model, choose_split, find_decoder_layers
from fedbiot_trainer.server.split_check import check_split
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.wire.package import load_model


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
TEXT = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8}
VISION |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}


def test_class_that_clients_could_not_load(make_runner):
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=MistralConfig(**TEXT), vision_config=VISION))
    assert find_decoder_layers(model)[0] == "model.language_model.layers"
    message = (
        "`model` is Mistral3ForConditionalGeneration, but `AutoModelForCausalLM` makes no model of its Mistral3Config"
    )
    with pytest.raises(ValueError, match=message):
        make_runner(model)


def test_remote_code_says_itself_what_loads_it():
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=MistralConfig(**TEXT), vision_config=VISION))
    model.config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    check_full_model(model)


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_model_with_an_adapter(how, make_runner):
    model, lora = tiny_model(), LoraConfig(target_modules=["q_proj"])
    if how == "get_peft_model":
        model = get_peft_model(model, lora)
    else:
        model.add_adapter(lora)
    with pytest.raises(ValueError, match="with a PEFT adapter on it, .* merge the adapter into it first"):
        make_runner(model)


def test_merged_adapter():
    check_full_model(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).merge_and_unload())


def test_adapter_folder(tmp_path, make_runner):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for give in (load_model, make_runner):
        with pytest.raises(ValueError, match="which holds a PEFT adapter and no model. Pass its base model"):
            give(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "settings, message",
    [({"use_liger_kernel": True}, "pip install liger-kernel"), ({"optim": "adamw_anyprecision"}, "torchdistx")],
)
def test_libraries_are_asked_for_before_any_work(settings, message, make_runner):
    with pytest.raises((ImportError, ValueError), match=message):
        make_runner(**settings)


def test_attention_library_is_asked_for_by_the_model(tmp_path, make_runner):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ImportError, match="FlashAttention2"):
        make_runner(str(tmp_path / "model"), model_init_kwargs={"attn_implementation": "flash_attention_2"})


def test_per_layer_settings_follow_the_layers():
    model = tiny_model("gemma4_text", head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0)
    if not model.config.per_layer_config:
        pytest.skip("this transformers has no settings of single layers for it")
    split = choose_split(model, 2, 0.5)
    kept = drop_layers(model, split).config
    for position, full in enumerate(split.full_indices):
        assert kept.per_layer_config[position].head_dim == model.config.per_layer_config[full].head_dim


@pytest.mark.parametrize(
    "model_type, settings, name, kept",
    [
        (
            "llama4_text",
            {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48},
            "moe_layers",
            [0, 1, 2, 3, 4],
        ),
        ("bamba", {**MAMBA, "attn_layer_indices": [1, 3, 7]}, "attn_layer_indices", [1, 4]),
    ],
)
def test_lists_of_layers_follow_them(model_type, settings, name, kept):
    model = tiny_model(model_type, **settings)
    assert getattr(drop_layers(model, choose_split(model, 2, 0.5)).config, name) == kept


def test_model_without_a_number_of_layers():
    model = tiny_model()
    config = type("Config", (), {"is_encoder_decoder": False, "get_text_config": lambda self: self})()
    model.config = config
    with pytest.raises(ValueError, match="LlamaForCausalLM, in which 0 lists of None decoder layers"):
        find_decoder_layers(model)


def test_rwkv_that_has_been_evaluated():
    model = tiny_model("rwkv", attention_hidden_size=32, context_length=64, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    emulator = drop_layers(model, choose_split(model, 2, 0.0))
    # The model scales its weights and hidden states, which changes only what an epsilon is next to a variance.
    for norm in (*model.modules(), *emulator.modules()):
        if isinstance(norm, torch.nn.LayerNorm):
            norm.eps = 0.0
    ids = torch.arange(3, 9)[None]
    logits = emulator(input_ids=ids).logits
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert torch.allclose(model(input_ids=ids).logits, logits, rtol=0, atol=HALF_THE_DIGITS)
    with pytest.raises(ValueError, match="RwkvForCausalLM, which has been evaluated, and scales its weights in place"):
        drop_layers(model, choose_split(model, 2, 0.5))


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "bart", "openai-gpt"])
def test_decoders_that_are_called_otherwise(model_type):
    sizes = {"decoder_layers": 8, "encoder_layers": 2, "d_model": 32, "decoder_ffn_dim": 48, "is_decoder": True}
    model = tiny_model(
        model_type, bos_token_id=1, **({**sizes, "decoder_attention_heads": 4} if model_type == "bart" else {})
    )
    split = choose_split(model, 2, 0.5)
    assert split.num_layers == 8
    check_split(SplitModel(model, 2, 0.5), torch.device("cpu"))


def test_towers_of_equal_depth_inside_the_decoder():
    model = tiny_model()
    model.model.images = torch.nn.ModuleDict({"tower": torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(8)])})
    assert find_decoder_layers(model)[0] == "model.layers"
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(8)])
    with pytest.raises(ValueError, match="2 lists of 8 decoder layers were found .model.layers, model.others"):
        find_decoder_layers(model)
