import pytest
from conftest import assert_same_model, needs_experts, random_lora, slow, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion
from transformers import AutoConfig, AutoModelForCausalLM

from fedbiot_trainer.server.lora_placement import LoraPlacement, check_placement, place_loras
from fedbiot_trainer.server.split import choose_split
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared import compat
from fedbiot_trainer.shared.lora_state import get_lora_state, save_lora
from fedbiot_trainer.wire.package import EmulatorPackage


pytestmark = pytest.mark.architectures

MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 0}
EXPERTS = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MIXTURES = {
    "glm4_moe": {**EXPERTS, "head_dim": 8},
    "deepseek_v2": {**EXPERTS, **MLA},
    "deepseek_v3": {**EXPERTS, **MLA},
    "dots1": EXPERTS,
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_layer_start_index": 0, "moe_k": 2, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
}


def layers_of(model, lora_name):
    names = [name for name, m in model.named_modules() if isinstance(m, LoraLayer) and lora_name in m.r]
    return sorted({int(name.split("layers.")[1].split(".")[0]) for name in names})


def settings_of(model, lora_name="client"):
    return [(m.r[lora_name], m.scaling[lora_name]) for m in model.modules() if getattr(m, "r", {}).get(lora_name)]


def test_mixtures_of_experts_are_refused_where_peft_cannot_load_them(monkeypatch):
    def of_old(conversions, adapter_name):
        if any(conversion.operations for conversion in conversions if hasattr(conversion, "operations")):
            raise TypeError("WeightConverter.__init__() got an unexpected keyword argument 'distributed_operation'")

    if not compat.EXPERTS.applies:
        monkeypatch.setattr(compat.Difference, "applies", True)
        monkeypatch.setattr(transformers_weight_conversion, "build_peft_weight_mapping", of_old)
    model = tiny_model("mixtral", **MIXTURES["mixtral"])
    with pytest.raises(
        ValueError, match="MixtralForCausalLM, a mixture of experts, of which PEFT .* can load no LoRA"
    ):
        place_loras(model, choose_split(model, 2, 0.5), LoraConfig())
    model = tiny_model()
    place_loras(model, choose_split(model, 2, 0.5), LoraConfig())


@needs_experts
@pytest.mark.parametrize("drop", [slow(0.0), 0.5])
@pytest.mark.parametrize("targets", [slow(None), "all-linear"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_of_experts_have_the_loras_on_their_layers(model_type, targets, drop, tmp_path, batch):
    make = lambda: tiny_model(model_type, **MIXTURES[model_type])  # noqa: E731
    models = SplitModel(make(), 2, drop, LoraConfig(r=4, target_modules=targets))
    assert layers_of(models.adap_emu, "client") == list(models.split.adapter_positions)
    assert layers_of(models.adap_emu, "emulator") == list(models.split.emulator_positions)
    assert layers_of(models.adap_fu, "client") == [6, 7]
    assert not models.adap_fu.peft_config["client"].target_parameters

    state = random_lora(get_lora_state(models.adap_emu, "client"))
    models.plug_in(state)
    save_lora(tmp_path, models.adap_fu.peft_config["client"], models.split.to_full(state), None)
    plain = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert_same_model(models.adap_fu, plain, batch)


@needs_experts
def test_frozen_experts_are_told(monkeypatch):
    told = []
    monkeypatch.setattr("fedbiot_trainer.server.lora_placement.logger.warning_once", told.append)
    place_loras(model := tiny_model("glm4_moe", **MIXTURES["glm4_moe"]), choose_split(model, 2, 0.5), LoraConfig())
    assert "PEFT cannot train down_proj, gate_proj, mlp.experts, up_proj on some layers alone" in told[0]
    told.clear()
    place_loras(model := tiny_model(), choose_split(model, 2, 0.5), LoraConfig(target_modules="all-linear"))
    assert not told


def gemma3(vision_layers):
    text = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": vision_layers}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    tokens = {"boi_token_index": 40, "eoi_token_index": 41, "image_token_index": 42, "mm_tokens_per_image": 4}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **tokens)
    )


@pytest.mark.parametrize("vision_layers", [4, 8, 12])
def test_vision_tower_with_layers_of_that_name_gets_no_lora(vision_layers):
    models = SplitModel(gemma3(vision_layers), 2, 0.5)
    for model, lora_name in (
        (models.adap_emu, "client"),
        (models.adap_emu, "emulator"),
        (models.adap_fu, "client"),
    ):
        assert all("language_model.layers." in key for key in get_lora_state(model, lora_name))


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    "pattern", ["layers.7.self_attn.q_proj", r"layers\.[67]\..*", "q_proj", r".*\.7\.self_attn\..*"]
)
def test_patterns_follow_the_layers_of_the_full_model(field, pattern, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **{field: {pattern: 16}})
    models = SplitModel(tiny_model(), 2, 0.5, config)
    config.layers_to_transform = [6, 7]
    expected = settings_of(get_peft_model(tiny_model(), config), "default")
    assert settings_of(models.adap_emu) == settings_of(models.adap_fu) == expected
    assert len(set(expected)) == 2 or pattern.startswith(r"layers\.[67]")
    package = models.package(*(get_lora_state(models.adap_emu, name) for name in ("client", "emulator")))
    package.save(tmp_path)
    assert settings_of(EmulatorPackage.load(tmp_path).peft_model()) == expected


@pytest.mark.parametrize(
    "settings, layers",
    [
        ({"target_modules": "all-linear", "exclude_modules": r".*layers\.7\..*"}, {"client": [6]}),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.6.self_attn.q_proj"]}, {"client": [7]}),
        ({"target_modules": r".*\.layers\.(0|6)\.self_attn\.q_proj"}, {"client": [6]}),
        ({"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in (3, 7)]}, {"client": [7]}),
    ],
    ids=["exclude-regex", "exclude-path", "regex", "paths"],
)
def test_settings_that_name_layers_name_those_of_the_full_model(settings, layers, tmp_path, batch):
    models = SplitModel(tiny_model(), 2, 0.5, LoraConfig(r=4, **settings))
    assert layers_of(models.adap_fu, "client") == layers["client"]
    state = random_lora(get_lora_state(models.adap_emu, "client"))
    models.plug_in(state)
    save_lora(tmp_path, models.adap_fu.peft_config["client"], models.split.to_full(state), None)
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert_same_model(models.adap_fu, plain, batch)


def test_many_targets_by_full_name():
    # PEFT condenses long lists of names by itself.
    names = [
        f"model.layers.{i}.{m}" for i in range(8) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    ]
    models = SplitModel(
        tiny_model(), 6, 0.0, LoraConfig(r=4, target_modules=names, exclude_modules=["layers.5.mlp.up_proj"])
    )
    assert len(settings_of(models.adap_fu)) == len(settings_of(models.adap_emu)) == 6 * 3 - 1


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "`target_modules` has 'lm_head' in `peft_config`, which matches no",
        ),
        (
            {"target_modules": ["q_proj", "lm_head", "v_porj"], "rank_pattern": {"k_porj": 2}},
            "`target_modules` has 'lm_head', 'v_porj'; `rank_pattern` has 'k_porj' in `peft_config`, which match no linear",
        ),
        ({"target_modules": ["q_proj", "v_porj"]}, "`target_modules` has 'v_porj' .* There are: mlp.down_proj"),
        (
            {"target_modules": ["q_proj", "model.layers.1.self_attn.k_proj"]},
            r"layers.1.self_attn.k_proj' .*\[0, 3, 5, 6",
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2, "up_porj": 2}}, "`rank_pattern` has 'up_porj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"layers.9.x": 2}}, "`alpha_pattern` has 'layers.9.x'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["v_porj"]}, "`exclude_modules` has 'v_porj'"),
        ({"target_modules": r".*\.layers\.[67]\..*q_proj"}, "in the emulator layers .* `emulator_peft_config`"),
    ],
)
def test_settings_that_name_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        SplitModel(tiny_model(), 2, 0.5, LoraConfig(r=4, **settings))


def test_each_lora_with_paths_of_its_own():
    top, below = (LoraConfig(target_modules=rf".*\.layers\.[{i}]\..*q_proj") for i in ("67", "0-5"))
    models = SplitModel(tiny_model(), 2, 0.5, top, below)
    assert layers_of(models.adap_emu, "emulator") == [0, 1, 2]


@needs_experts
@pytest.mark.parametrize(
    "targets", [["q_proj", "gate_proj", "up_proj", "down_proj"], ["gate_proj"], r".*\.(q|gate)_proj"]
)
def test_experts_cannot_be_named(targets):
    model = tiny_model("glm4_moe", **MIXTURES["glm4_moe"])
    with pytest.raises(ValueError, match="PEFT takes .*gate_proj.* for weights of the experts.* use 'all-linear'"):
        SplitModel(model, 2, 0.5, LoraConfig(target_modules=targets))


def test_placement_is_checked():
    models = SplitModel(tiny_model(), 2, 0.5, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    right = {f"model.layers.{i}.self_attn.q_proj": (4, 8) for i in (6, 7)}
    check_placement(models.adap_fu, "client", LoraPlacement(LoraConfig(), "model.layers", right))
    for wrong in ({**right, "model.layers.5.self_attn.q_proj": (4, 8)}, dict.fromkeys(right, (4, 16))):
        with pytest.raises(ValueError, match="LlamaForCausalLM, on which PEFT puts the client LoRA elsewhere"):
            check_placement(models.adap_fu, "client", LoraPlacement(LoraConfig(), "model.layers", wrong))
