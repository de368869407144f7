import copy
import shutil

import pytest
from conftest import slow, sums, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import SFTConfig, SFTTrainer

from fedbiot_trainer.cli.merge import merge
from fedbiot_trainer.shared.tokenizers import end_tokens, prepare_tokenizer, prompt_tokens


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CHAT = Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": f"{i}+1="}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(12)
    ]
)
LORA = LoraConfig(r=4, target_modules=["q_proj"])


def contents(folder):
    """Files of a tokenizer, loaded and written again."""
    again = folder.parent / "again"
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    found = {path.name: path.read_text() for path in again.iterdir()}
    shutil.rmtree(again)
    return found


def ends(folder):
    generation = GenerationConfig.from_pretrained(folder)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    return [getattr(c, f"{name}_token_id") for c in (generation, config) for name in ("eos", "bos", "pad")]


@pytest.mark.parametrize(
    "settings",
    [
        slow({}, id="plain"),
        pytest.param({"eos_token": "."}, id="eos"),
        slow({"pad_token": "?"}, id="pad"),
        pytest.param({"template": "file"}, id="template"),
    ],
)
def test_four_outputs_are_those_of_trl(make_runner, tokenizer, tmp_path, settings):
    """Package, merged AdapEmu, `client_lora/` and merged AdapFu, against an `SFTTrainer` of the full model."""
    data = sums(0, 8)
    if settings.pop("template", None):
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        settings, data = {"chat_template_path": str(tmp_path / "chat.jinja")}, CHAT
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 7]
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = SFTConfig(str(tmp_path / "trl"), max_steps=1, report_to="none", use_cpu=True, bf16=False, **settings)
    plain = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), args, train_dataset=data,
        processing_class=copy.deepcopy(tokenizer), peft_config=LORA,
    )  # fmt: skip
    plain.train()
    plain.model.merge_and_unload().save_pretrained(tmp_path / "trl")
    plain.processing_class.save_pretrained(tmp_path / "trl")
    before = copy.deepcopy(tokenizer.init_kwargs), tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template

    data = {"client_datasets": {"a": data}, "public_dataset": data, "eval_dataset": data}
    run = make_runner(model=str(tmp_path / "base"), num_rounds=1, peft_config=LORA, **data, **settings)
    run.train()
    package, client_lora = run.folder.path / "emulator_package", run.folder.path / "client_lora"
    merge(package, tmp_path / "adap_emu")
    merge(client_lora, tmp_path / "adap_fu")
    for folder in (package, client_lora, tmp_path / "adap_emu", tmp_path / "adap_fu"):
        assert contents(folder) == contents(tmp_path / "trl")
    for folder in (package, tmp_path / "adap_emu", tmp_path / "adap_fu"):
        assert ends(folder) == ends(tmp_path / "trl")
        assert GenerationConfig.from_pretrained(folder).repetition_penalty == 1.5
    after = copy.deepcopy(tokenizer.init_kwargs), tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template
    assert before == after


def test_end_token_ends_adap_emu(make_runner, tmp_path):
    """A run that has learned to stop at another end token stops there, in both merged models."""
    data = Dataset.from_dict({"prompt": ["say"] * 8, "completion": ["yes"] * 8})
    data = {"client_datasets": {"a": data}, "public_dataset": data, "eval_dataset": data}
    run = make_runner(num_rounds=2, local_steps=60, eos_token=".", **data)
    run.train()
    model = merge(run.folder.path / "emulator_package", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("say", return_tensors="pt", return_token_type_ids=False)
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0]).replace(" ", "") == "sayyes."


def test_callers_model_keeps_its_configuration(make_runner):
    model = tiny_model()
    before = model.config.to_dict(), model.generation_config.to_dict()
    make_runner(model, num_rounds=0, eos_token=".", initial_alignment_steps=0, alignment_steps=0).train()
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before


def test_template_of_a_tokenizer_with_other_tokens_is_refused(make_runner, tokenizer, tmp_path):
    source = copy.deepcopy(tokenizer)
    source.chat_template = TEMPLATE
    source.save_pretrained(tmp_path / "same")
    source.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    source.save_pretrained(tmp_path / "other")
    data = {"client_datasets": {"a": CHAT}, "public_dataset": CHAT, "eval_dataset": CHAT}
    model = tiny_model()
    with pytest.raises(
        ValueError, match="has 2 tokens that `processing_class` lacks .<|im_start|>, .* Resize the full"
    ):
        make_runner(model, chat_template_path=str(tmp_path / "other"), **data)
    settings = {"num_rounds": 1, "overwrite_output_dir": True}
    make_runner(model, chat_template_path=str(tmp_path / "same"), **settings, **data).train()
    assert model.get_input_embeddings().weight.shape[0] == 48
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="`chat_template_path` is '.*none', whose tokenizer has no chat template"):
        make_runner(model, chat_template_path=str(tmp_path / "none"), **settings, **data)


def test_conversations_without_a_template_are_refused(make_runner):
    data = {"public_dataset": sums(0, 4), "eval_dataset": sums(4, 6)}
    for name, changes in {
        "The dataset of client 'a'": {"client_datasets": {"a": CHAT}},
        "`public_dataset`": {"public_dataset": CHAT},
    }.items():
        with pytest.raises(ValueError, match=f"{name} is a conversation, but `processing_class` has no chat template"):
            make_runner(**{**data, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eos_token": "<|end|>"}, "`eos_token` is '<|end|>', which is not in the vocabulary of `processing_class`"),
        ({"pad_token": "<|pad|>"}, "`pad_token` is '<|pad|>', which is not in the vocabulary"),
    ],
)
def test_unknown_tokens(make_args, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        prepare_tokenizer(tokenizer, make_args(**changes))


def test_tokenizer_without_an_end_token(make_args, tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="`processing_class` has no end token .* with `eos_token`"):
        prepare_tokenizer(endless, make_args())
    assert prepare_tokenizer(endless, make_args(eos_token=".")).eos_token == "."
    with pytest.raises(TypeError, match="`processing_class` must be a tokenizer, got dict"):
        prepare_tokenizer({}, make_args())


@pytest.mark.parametrize("single", ["$A <eos>", "<pad> $A <eos> <eos>", "<pad> $A", "$A"])
def test_prompt_has_no_appended_end(tokenizer, single):
    own = copy.deepcopy(tokenizer)
    tokens = [(token, own.convert_tokens_to_ids(token)) for token in ("<eos>", "<pad>")]
    own._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    start = [0] if single.startswith("<pad>") else []
    assert prompt_tokens("1+1=", own) == start + tokenizer("1+1=")["input_ids"]
    assert prompt_tokens("", own) == (start or [1])
    assert prompt_tokens("a<eos>", own)[-1] == 1  # one that is written there stays


def test_end_tokens_are_those_of_both(tokenizer):
    model = tiny_model()
    model.generation_config.eos_token_id = [7, 1]
    assert end_tokens(model, tokenizer) == [1, 7]
    assert end_tokens(get_peft_model(model, LORA), tokenizer) == [1, 7]
    model.generation_config.eos_token_id = 9
    assert end_tokens(model, tokenizer) == [1, 9]
