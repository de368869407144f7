import math
from datetime import datetime

import pytest
from conftest import sums
from datasets import Dataset

from fedbiot_trainer import partition_dataset
from fedbiot_trainer.data.partition import name_client_datasets, rows_by_value


def labelled(values):
    return Dataset.from_dict({"text": [f"t{i}" for i in range(len(values))], "label": values})


@pytest.mark.parametrize(
    "values",
    [
        ["a", None, "b", None],
        [1.0, math.nan, 2.0, math.nan],
        ["a", "", "b", " "],
        [datetime(2024, 1, 1), None, None, None],
    ],
    ids=["None", "NaN", "blank", "no time"],
)
@pytest.mark.parametrize("partition", ["by-column", "dirichlet"])
def test_missing_values_are_named(make_args, values, partition):
    args = make_args(partition=partition, partition_column="label", num_clients=2)
    with pytest.raises(
        ValueError, match=r"`partition_column` is 'label', which is empty in \d of the 4 rows of `train_da"
    ):
        partition_dataset(labelled(values), args)
    rows = rows_by_value(labelled(values), "label", "train_dataset")
    assert sorted(row for group in rows.values() for row in group) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "values", [["None", "nan", "a", "A", " a", "1"], [1, 2, 2, 1], [1.0, 1.5, 1.0], [True, False, True]]
)
def test_partition_by_column_loses_no_row(make_args, values):
    parts = partition_dataset(labelled(values), make_args(partition="by-column", partition_column="label"))
    assert sum(len(part) for part in parts.values()) == len(values)
    assert all({str(label) for label in part["label"]} == {name} for name, part in parts.items())


def test_column_of_lists_is_refused(make_args):
    args = make_args(partition="by-column", partition_column="label")
    with pytest.raises(ValueError, match="row 0 of `train_dataset` has .* there, which is no label"):
        partition_dataset(labelled([["a"], ["b"]]), args)


def test_numbers_become_client_names(make_args):
    assert list(name_client_datasets({0: sums(0, 2), 1: sums(2, 4)}, None, make_args())) == ["0", "1"]
    with pytest.raises(ValueError, match=r"the name\(s\) 1 more than once"):
        name_client_datasets({1: sums(0, 2), "1": sums(2, 4)}, None, make_args())


@pytest.mark.parametrize("name", [None, ("a", 1), "", True, 1.5], ids=repr)
def test_names_that_are_none(make_args, name):
    with pytest.raises(TypeError, match="has the name .*, but clients are named by text or a number"):
        name_client_datasets({name: sums(0, 2)}, None, make_args())


def test_one_dataset_is_no_dict_of_clients(make_args):
    with pytest.raises(TypeError, match="`client_datasets` is a `Dataset`, .* as `train_dataset`"):
        name_client_datasets(sums(0, 2), None, make_args())


def test_client_without_conversations_is_named(make_args):
    chat = Dataset.from_dict({"messages": [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]})
    with pytest.raises(ValueError, match="`assistant_only_loss` is True, but the dataset of client 'b' is no convers"):
        name_client_datasets({"a": chat, "b": sums(0, 2)}, None, make_args(assistant_only_loss=True))
