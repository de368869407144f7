import copy
from dataclasses import dataclass, fields

import peft
import pytest
import torch
from conftest import slow, tiny_model
from peft import LoraConfig, PrefixTuningConfig
from torch import nn

from fedbiot_trainer.server.lora_options import ALLOWED, WITHOUT_EFFECT, check_lora_options


OPTIONS = {
    "r": {"r": 2},
    "lora_alpha": {"lora_alpha": 32},
    "lora_dropout": {"lora_dropout": 0.1},
    "use_rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"layers.7.self_attn.q_proj": 64}},
    "target_modules": {"target_modules": "all-linear"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
}


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def describe(tokenizer):
    names = ("chat_template", "special_tokens_map", "padding_side", "model_max_length", "init_kwargs")
    return copy.deepcopy([getattr(tokenizer, name) for name in names]), tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "option", [name if name in ("r", "gaussian", "rank_pattern", "target_modules") else slow(name) for name in OPTIONS]
)
def test_a_run_leaves_what_it_was_given_as_it_was(option, make_runner, tokenizer):
    assert ALLOWED <= {name for settings in OPTIONS.values() for name in settings} | {"init_lora_weights"}
    model, tokenizer.chat_template = tiny_model(), None
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **OPTIONS[option]})
    before = tensors_of(model), model.config.to_dict(), describe(tokenizer), config.to_dict()
    generation = model.generation_config.to_dict()
    make_runner(model, peft_config=config, num_rounds=1, local_steps=1, initial_alignment_steps=1).train()
    after = tensors_of(model)
    assert after.keys() == before[0].keys()
    assert all(torch.equal(after[name], before[0][name]) for name in after)
    assert (model.config.to_dict(), describe(tokenizer), config.to_dict()) == before[1:]
    assert model.generation_config.to_dict() == generation


def example(field):
    """A value of a field that changes something, whatever it is."""
    return {"bias": "all", "init_lora_weights": "pissa", "task_type": "SEQ_CLS"}.get(field.name, 3)


@pytest.mark.parametrize("field", [f for f in fields(LoraConfig) if f.name not in ALLOWED | WITHOUT_EFFECT])
def test_every_other_option_is_refused_by_name(field):
    config = LoraConfig(target_modules=["q_proj"])
    setattr(config, field.name, example(field))
    with pytest.raises(ValueError, match=f"`{field.name}` is .* in `emulator_peft_config`, but .* Leave it out"):
        check_lora_options(config, "emulator_peft_config")


def test_an_option_of_tomorrow_is_refused():
    @dataclass
    class Tomorrow(LoraConfig):
        use_tomorrow: bool = False

    check_lora_options(Tomorrow())
    with pytest.raises(ValueError, match="`use_tomorrow` is True in `peft_config`, but it is not known here"):
        check_lora_options(Tomorrow(use_tomorrow=True))


def test_kasa_is_refused():
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    with pytest.raises(ValueError, match="`kasa_config` is KasaConfig.* it changes the frozen weights"):
        check_lora_options(LoraConfig(kasa_config=peft.KasaConfig()))


def test_what_is_no_option_of_a_field():
    with pytest.raises(TypeError, match="`peft_config` must be a `peft.LoraConfig`, got PrefixTuningConfig"):
        check_lora_options(PrefixTuningConfig())
    with pytest.raises(ValueError, match="`task_type` is 'SEQ_CLS' in `peft_config`, but the model is a causal LM"):
        check_lora_options(LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="`init_lora_weights` is 'pissa' .* must start as a zero update"):
        check_lora_options(LoraConfig(init_lora_weights="pissa"))
    custom = LoraConfig()
    custom._register_custom_module({nn.Conv2d: nn.Linear})
    with pytest.raises(ValueError, match="`peft_config` has custom LoRA layers"):
        check_lora_options(custom)
