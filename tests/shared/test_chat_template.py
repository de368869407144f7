import copy

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset

from fedbiot_trainer import ClientSFTTrainer


TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


def chats(start, stop):
    say = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [{"prompt": say("user", f"{i}+1="), "completion": say("assistant", f"{i + 1}")} for i in range(start, stop)]
    return Dataset.from_list(rows)


@pytest.fixture(params=["file", "folder"])
def source(request, tokenizer, tmp_path):
    if request.param == "file":
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        return str(tmp_path / "chat.jinja")
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    other.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_a_run_with_a_chat_template_leaves_model_and_tokenizer_alone(source, tokenizer, make_runner, make_args):
    # As many models have: more rows of embeddings than tokens.
    tokenizer, model = copy.deepcopy(tokenizer), tiny_model(vocab_size=64)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = {"chat_template_path": source, "num_rounds": 1, "local_steps": 1, "initial_alignment_steps": 1}
    data = {"client_datasets": {"a": chats(0, 9)}, "public_dataset": chats(20, 40), "eval_dataset": chats(40, 50)}
    runner = make_runner(model, **data, **settings)
    runner.train()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert tokenizer.chat_template is None
    ClientSFTTrainer(str(runner.folder.package), make_args(chat_template_path=source), train_dataset=chats(0, 9))


def test_tokens_that_the_model_does_not_have(tokenizer, tmp_path, make_runner):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    other.chat_template = TEMPLATE
    other.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="`chat_template_path` is "):
        make_runner(chat_template_path=str(tmp_path / "tokenizer"))
