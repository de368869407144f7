import copy

import pytest
from accelerate import Accelerator
from conftest import sums, tiny_model
from datasets import Dataset
from tokenizers import processors

from fedbiot_trainer.evaluation.passes import complete
from fedbiot_trainer.evaluation.text_metric import TextMetric


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TALK = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def seen_by(model):
    """What `generate` is given, and with which configuration."""
    seen, generate = [], model.generate

    def spy(**inputs):
        seen.append((inputs, copy.deepcopy(model.generation_config)))
        return generate(**inputs)

    model.generate = spy
    return seen


def test_prompts_are_gone_on_from(tokenizer):
    """Not completed after an end token that the tokenizer appends, and padded on the left."""
    tokenizer, model = copy.deepcopy(tokenizer), tiny_model()
    tokenizer.padding_side = "right"  # other tests' pipelines pad the shared one on the left
    own = copy.deepcopy(tokenizer)
    own._tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    seen = seen_by(model)
    appended = complete(model, ["1+1=", "abc"], own, 2, 4, Accelerator(cpu=True))
    assert seen[0][0]["input_ids"].tolist() == [tokenizer("1+1=").input_ids, [0, *tokenizer("abc").input_ids]]
    assert seen[0][0]["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert appended == complete(model, ["1+1=", "abc"], tokenizer, 1, 4, Accelerator(cpu=True))
    assert tokenizer.padding_side == "right"


def test_generation_is_greedy_whatever_the_model_says(tokenizer):
    plain, biased = tiny_model(), tiny_model()
    config = biased.generation_config
    config.num_beams, config.repetition_penalty, config.min_length, config.do_sample = 3, 5.0, 60, True
    config.eos_token_id = [7, 8]
    seen = seen_by(biased)
    results = [complete(model, ["1+1=", "ab"], tokenizer, 2, 8, Accelerator(cpu=True)) for model in (plain, biased)]
    assert seen[0][1].eos_token_id == [1, 7, 8]  # any of them ends
    assert seen[0][1].num_beams in (None, 1) and seen[0][1].repetition_penalty in (None, 1.0)
    assert biased.generation_config is config and config.num_beams == 3
    assert all(long.startswith(short) for long, short in zip(*results, strict=True))


def test_text_after_an_end_token_is_cut(tokenizer, monkeypatch):
    import torch

    model = tiny_model()
    model.generation_config.eos_token_id = [5]
    monkeypatch.setattr(
        model, "generate", lambda **k: torch.cat([k["input_ids"], torch.tensor([[10, 11, 5, 12]])], dim=1)
    )
    [text] = complete(model, ["1"], tokenizer, 1, 4, Accelerator(cpu=True))
    assert text.replace(" ", "") == tokenizer.decode([10, 11]).replace(" ", "")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": TALK[:1], "answer": "2"},
        {"conversations": [{"from": "user", "value": "1+1="}, {"from": "gpt", "value": "2"}]},
        {"prompt": "1+1=", "messages": TALK},
    ],
    ids=["messages", "completion", "answer", "from-value", "prompt and messages"],
)
def test_metric_of_conversations(make_args, tokenizer, row):
    own, model = copy.deepcopy(tokenizer), tiny_model()
    own.chat_template = TEMPLATE
    column = "answer" if "answer" in row else "completion"
    metric = TextMetric(
        make_args(eval_metric="exact_match", eval_reference_column=column), Dataset.from_list([row] * 2)
    )
    assert metric.references == ["2", "2"]
    seen = seen_by(model)
    texts = complete(model, metric.prompts, own, 2, 4, Accelerator(cpu=True))
    assert seen[0][0]["input_ids"][0].tolist() == tokenizer("user:1+1=.assistant:").input_ids
    assert metric.compute(["2", "3"], Accelerator(cpu=True)) == {"exact_match": 0.5} and len(texts) == 2


def test_tools_and_template_settings_reach_the_template(make_args):
    row = {"messages": TALK, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"thinking": False}}
    metric = TextMetric(make_args(eval_metric="exact_match"), Dataset.from_list([row]))
    assert metric.prompts == [{"conversation": TALK[:1], "tools": [{"name": "f"}], "thinking": False}]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"messages": TALK}, {"messages": TALK[:1]}], "has 1 messages in row 1, the last by 'user'. End each"),
        ([{"messages": TALK}, {"messages": TALK[1:]}], "the conversation in row 1 of `eval_dataset` has one message"),
        (
            [{"prompt": TALK[:1], "completion": TALK[1:] * 2}],
            "column `completion` of `eval_dataset` has 2 messages in r",
        ),
        ([{"text": "x"}], "has no plain `prompt` column and no conversations"),
        (
            [{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": None}],
            "empty in row 1 of `eval_dataset`",
        ),
        ([{"messages": TALK, "entry_point": "f", "tests": "x"}], "an `entry_point` column, .* are conversations"),
    ],
)
def test_what_cannot_be_answered(make_args, rows, message, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    args = make_args(eval_metric="exact_match")
    if "tests" in rows[0]:
        args = make_args(eval_metric="pass_at_k", eval_reference_column="tests")
    with pytest.raises(ValueError, match=message):
        TextMetric(args, Dataset.from_list(rows))


def test_run_with_conversations(make_runner, tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": f"{i}+1="}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(12)
    ]
    data = Dataset.from_list(rows)
    run = make_runner(
        num_rounds=1, client_datasets={"a": data}, public_dataset=data, eval_dataset=data, eval_metric="exact_match",
        eval_max_new_tokens=4, chat_template_path=str(tmp_path / "chat.jinja"),
    )  # fmt: skip
    assert 0 <= run.train().adap_fu["exact_match"] <= 1


def test_no_position_to_generate_at(make_runner):
    with pytest.raises(
        ValueError, match="`eval_max_new_tokens` is 124 and the longest prompt .* has 5 tokens, but the m"
    ):
        make_runner(eval_metric="exact_match", eval_max_new_tokens=124)
    make_runner(eval_metric="exact_match", eval_max_new_tokens=123)


def test_evaluation_sets_by_name(make_runner):
    """Each set's scores are those of a run with that set alone; the mean is over all tokens."""
    sets = {"clinic": sums(50, 53), "shop": sums(53, 60)}
    settings = {"num_rounds": 1, "overwrite_output_dir": True, "eval_metric": "exact_match", "eval_max_new_tokens": 3}
    run = make_runner(eval_dataset=sets, **settings)
    together = run.train()
    record = run.records[0]
    alone = {name: make_runner(eval_dataset=dataset, **settings).train() for name, dataset in sets.items()}
    from datasets import concatenate_datasets

    whole = make_runner(eval_dataset=concatenate_datasets(list(sets.values())), **settings).train()
    for who in ("zero_shot", "adap_emu", "adap_fu"):
        scores = getattr(together, who)
        for name, summary in alone.items():
            for metric, value in getattr(summary, who).items():
                assert scores[f"{name}_{metric}"] == pytest.approx(value, abs=1e-5)
        for metric in ("loss", "token_accuracy"):
            assert scores[metric] == pytest.approx(getattr(whole, who)[metric], abs=1e-5)
    assert record.adap_fu_loss == pytest.approx(together.adap_fu["loss"])
    assert record.evaluations["adap_fu"]["shop_loss"] == pytest.approx(together.adap_fu["shop_loss"])
    assert record.evaluations.keys() == {"adap_emu", "adap_fu"}
    [evaluated] = [log for log in run.state.log_history if "eval_adap_fu_clinic_loss" in log]
    assert evaluated["eval_adap_fu_clinic_loss"] == pytest.approx(together.adap_fu["clinic_loss"])


@pytest.mark.parametrize(
    "sets, message",
    [({}, "`eval_dataset` is a dict without any set"), ({"": sums(0, 2)}, "the name '', but sets are named by text")],
)
def test_evaluation_sets_without_names(make_runner, sets, message):
    with pytest.raises(ValueError, match=message):
        make_runner(eval_dataset=sets)


def test_set_that_is_no_text_is_named(make_runner):
    bad = Dataset.from_dict({"prompt": ["1", None], "completion": ["2", "3"]})
    with pytest.raises(ValueError, match=r"`eval_dataset\['shop'\]` has no text in row 1, column `prompt`"):
        make_runner(eval_dataset={"clinic": sums(0, 2), "shop": bad})
