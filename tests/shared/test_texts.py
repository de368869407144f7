import numpy as np
import pytest
from conftest import sums
from datasets import Dataset, DatasetDict

from fedbiot_trainer.shared.texts import (
    blank_rows,
    check_texts,
    text_columns,
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
