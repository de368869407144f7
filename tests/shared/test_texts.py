import numpy as np
import pytest
from conftest import sums
from datasets import Dataset, DatasetDict

from fedbiot_trainer.shared.texts import (
    blank_rows,
    check_texts,
    text_columns,
    token_bounds,
    token_lengths,
    trained_tokens,
    without_other_forms,
)


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


GOOD = messages(("user", "1+1="), ("assistant", "2"))


@pytest.mark.parametrize(
    "dataset",
    [
        sums(0, 2),
        Dataset.from_dict({"text": ["a", ""]}),
        Dataset.from_dict({"messages": [GOOD]}),
        Dataset.from_dict({"prompt": ["p"], "messages": [GOOD]}),
        Dataset.from_dict({"prompt": [GOOD[:1]], "completion": [GOOD[1:]]}),
        Dataset.from_dict({"conversations": [[{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]]}),
        Dataset.from_dict({"messages": [[{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]]}),
        Dataset.from_dict({"input_ids": [[1, 2]]}),
    ],
    ids=["completion", "text", "messages", "prompt and messages", "chat", "from-value", "tool call", "tokenized"],
)
def test_forms_that_can_be_trained_on(dataset):
    check_texts(dataset, "client 'a'")


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"instruction": ["add"], "output": ["3"]},
            "The dataset of client 'bad' has the columns instruction, output, but",
        ),
        ({"prompt": ["a"]}, "has the columns prompt, but it needs `text`, `messages`, or `prompt` and `completion`"),
        ({"prompt": ["a", "b"], "completion": ["2", None]}, "client 'bad' has no text in row 1, column `completion`"),
        ({"prompt": ["a", None], "completion": ["2", "4"]}, "client 'bad' has no text in row 1, column `prompt`"),
        ({"text": [None, None]}, "client 'bad' has no text in row 0, column `text`"),
        ({"messages": [GOOD, []]}, "client 'bad' has no messages .* in row 1, column `messages`"),
        ({"messages": [GOOD, None]}, "client 'bad' has no messages .* in row 1, column `messages`"),
        ({"messages": [GOOD, messages(("user", None))]}, "has no messages .* in row 1, column `messages`"),
        ({"messages": [["a", "b"]]}, "has no messages .* in row 0, column `messages`"),
        ({"messages": [[{"speaker": "user", "content": "x"}]]}, "has no messages .* in row 0, column `messages`"),
    ],
)
def test_rows_that_are_no_text(columns, message):
    with pytest.raises(ValueError, match=message):
        check_texts(Dataset.from_dict(columns), "client 'bad'")


def test_row_is_counted_over_batches_and_selections():
    rows = [f"{i}" for i in range(25_000)]
    rows[24_000] = None
    dataset = Dataset.from_dict({"text": rows})
    with pytest.raises(ValueError, match="in row 24000, column `text`"):
        check_texts(dataset, "`train_dataset`")
    with pytest.raises(ValueError, match="`train_dataset` has no text in row 1, column `text`"):
        check_texts(dataset.select([5, 24_000]), "`train_dataset`")
    check_texts(dataset.select(range(24_000)), "`train_dataset`")


@pytest.mark.parametrize(
    "dataset, message",
    [
        (Dataset.from_dict({"prompt": ["1"], "completion": [2]}), "has int64 in column `completion` from row 0 on"),
        (DatasetDict(train=sums(0, 2), test=sums(2, 3)), "got DatasetDict. It has the splits train, test: pick one"),
        (sums(0, 2).to_iterable_dataset(), "must be a `datasets.Dataset`, got IterableDataset. .* without streaming"),
        (["a"], "The dataset of client 'a' must be a `datasets.Dataset`, got list. `Dataset.from_list`"),
    ],
    ids=["numbers", "splits", "stream", "list"],
)
def test_what_is_no_dataset_of_text(dataset, message):
    with pytest.raises(TypeError, match=message):
        check_texts(dataset, "client 'a'")


@pytest.mark.parametrize(
    "columns, error, message",
    [
        (
            {"input_ids": ["a"]},
            TypeError,
            "`eval_dataset` has string in column `input_ids`, which is no list of tokens",
        ),
        ({"input_ids": [[1.5]]}, TypeError, "in column `input_ids`, which is no list of tokens"),
        ({"input_ids": [[1]], "labels": [1]}, TypeError, "has int64 in column `labels`, which is no list of tokens"),
        ({"input_ids": [[1], None]}, ValueError, "`eval_dataset` has no list in row 1, column `input_ids`"),
        (
            {"input_ids": [[1, 2], [1]], "labels": [[1, 2], [1, 1]]},
            ValueError,
            "has no list as long as `input_ids` in row 1, column `labels`",
        ),
        ({"input_ids": [[1]], "labels": [None]}, TypeError, "in column `labels`, which is no list of tokens"),
    ],
    ids=["text", "decimals", "a class", "nothing", "shorter", "no labels"],
)
def test_tokens_that_are_none(columns, error, message):
    with pytest.raises(error, match=message):
        check_texts(Dataset.from_dict(columns), "`eval_dataset`")


def test_tokens_are_checked_over_batches():
    labels = [[1, 2]] * 12_000 + [[1]]
    tokens = Dataset.from_dict({"input_ids": [[1, 2]] * 12_001, "labels": labels})
    with pytest.raises(ValueError, match="in row 12000, column `labels`"):
        check_texts(tokens, "`eval_dataset`")
    check_texts(tokens.select(range(12_000)), "`eval_dataset`")
    assert token_bounds(tokens) == (1, 2) and token_bounds(Dataset.from_dict({"input_ids": [[]]})) == (0, 0)


def tokens_of(token, number=12):
    return Dataset.from_dict({"input_ids": [[5, token, 6]] * number, "labels": [[5, token, 6]] * number})


@pytest.mark.trains
@pytest.mark.parametrize("name", ["client", "eval_dataset", "public_dataset"])
@pytest.mark.parametrize("token", [48, -1])
def test_tokens_of_another_tokenizer_are_refused_before_a_run(make_runner, name, token):
    """Which a client would find in its first step, after the whole alignment."""
    clients = {"north": tokens_of(7), "south": tokens_of(token if name == "client" else 7)}
    changes = {"eval_dataset": tokens_of(7), "public_dataset": tokens_of(7)}
    changes |= {name: tokens_of(token)} if name in changes else {}
    where = "The dataset of client 'south'" if name == "client" else f"`{name}`"
    with pytest.raises(ValueError, match=f"{where} has the token {token}, but the model's embedding has 48 rows"):
        make_runner(client_datasets=clients, **changes)
    make_runner(client_datasets={"north": tokens_of(7)}, eval_dataset=tokens_of(7), public_dataset=tokens_of(47))


@pytest.mark.trains
def test_every_public_token_counts_in_the_alignment(make_alignment):
    masked = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 12, "labels": [[-100, -100, -100]] * 12})
    trainer = make_alignment(masked)
    assert len(trainer.train_dataset) == 12 and trainer.train_dataset["labels"][0] == [5, 6, 7]


@pytest.mark.trains
def test_held_out_text_of_another_form_is_told_of(make_runner, caplog):
    plain = Dataset.from_dict({"text": ["1+1=2"] * 4})
    with caplog.at_level("WARNING"):
        make_runner(eval_dataset=plain)
    assert (
        "`eval_dataset` has text, which is another form than the clients' text has: completions alone count"
        in caplog.text
    )
    caplog.clear()
    make_runner(client_datasets={"a": plain, "b": plain}, public_dataset=plain)
    assert "`eval_dataset` has prompt, completion, which is another form" in caplog.text
    caplog.clear()
    make_runner()
    assert "another form" not in caplog.text


def test_dataset_without_a_row():
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        check_texts(sums(0, 0), "`eval_dataset`")


def test_one_form_is_left():
    dataset = sums(0, 2).add_column("text", ["t"] * 6).add_column("topic", ["x"] * 6)
    assert text_columns(dataset, "a") == ("prompt", "completion")
    assert without_other_forms(dataset, "a").column_names == ["prompt", "completion", "topic"]


@pytest.mark.trains
@pytest.mark.parametrize("labels", [1, "cat", [1, 2, 3]], ids=["class", "name", "several"])
def test_classes_are_no_labels_of_tokens(make_alignment, labels):
    """TRL would keep a column `labels`, and fail at it in the first batch at the latest."""
    plain = make_alignment(sums(0, 4)).train_dataset
    given = sums(0, 4).add_column("labels", [labels] * 12).add_column("assistant_masks", [[1] * 4] * 12)
    prepared = make_alignment(given).train_dataset
    assert prepared["labels"][:] == plain["labels"][:] and prepared["input_ids"][:] == plain["input_ids"][:]
    tokens = plain.select_columns(["input_ids", "labels"])  # of which they are
    assert make_alignment(tokens).train_dataset["labels"][:] == plain["labels"][:]


@pytest.mark.parametrize("kind", ["pandas", "arrow"])
def test_formats_without_rows(kind):
    with pytest.raises(ValueError, match=f"`eval_dataset` has the format '{kind}'.*with_format.None"):
        check_texts(sums(0, 2).with_format(kind), "`eval_dataset`")
    check_texts(sums(0, 2).with_format("torch"), "`eval_dataset`")


def test_blank_rows():
    dataset = Dataset.from_dict({"prompt": ["", "a", " "], "completion": ["b", " \n", ""]})
    assert blank_rows(dataset, ("completion",)) == {1, 2}
    assert blank_rows(dataset, ("prompt", "completion")) == {2}
    assert blank_rows(dataset.select([2, 0]), ("completion",)) == {0}
    assert blank_rows(Dataset.from_dict({"messages": [GOOD]}), ("messages",)) == set()


def test_trained_tokens_follow_their_definition():
    generator = np.random.default_rng(0)
    labels = [generator.choice([-100, 7], size=size).tolist() for size in generator.integers(0, 9, 40)]
    dataset = Dataset.from_dict({"labels": labels, "input_ids": labels})
    for rows in (range(40), [3, 17, 4], range(5, 9)):
        for bound in (None, 1, 4):
            expected = [sum(label != -100 for label in labels[i][:bound][1:]) for i in rows]
            assert trained_tokens(dataset.select(rows), bound).tolist() == expected
        assert token_lengths(dataset.select(rows)).tolist() == [len(labels[i]) for i in rows]
