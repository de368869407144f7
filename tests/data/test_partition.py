import pytest
from conftest import sums
from datasets import Dataset

from fedbiot_trainer import partition_dataset
from fedbiot_trainer.data.partition import name_client_datasets


@pytest.fixture
def labelled():
    return Dataset.from_dict(
        {"text": [f"t{i}" for i in range(300)], "lang": [["c", "java", "rust"][i % 3] for i in range(300)]}
    )


def texts(parts):
    return sorted(text for part in parts.values() for text in part["text"])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_clients": 7},
        {"partition": "dirichlet", "partition_column": "lang", "num_clients": 7, "dirichlet_alpha": 0.1},
        {"partition": "by-column", "partition_column": "lang"},
    ],
    ids=["iid", "dirichlet", "by-column"],
)
def test_every_example_goes_to_one_client(labelled, make_args, settings):
    parts = partition_dataset(labelled, make_args(**settings))
    assert texts(parts) == sorted(labelled["text"])
    assert all(len(part) > 0 for part in parts.values())
    again = partition_dataset(labelled, make_args(**settings))
    assert all(parts[name]["text"] == again[name]["text"] for name in parts)
    if settings.get("partition") != "by-column":
        other = partition_dataset(labelled, make_args(**settings, seed=1))
        assert any(parts[name]["text"] != other[name]["text"] for name in parts)


def test_iid_parts_are_of_equal_size(labelled, make_args):
    parts = partition_dataset(labelled, make_args(num_clients=7))
    assert sorted(len(part) for part in parts.values()) == [42, 43, 43, 43, 43, 43, 43]


def test_dirichlet_is_more_skewed_with_smaller_alpha(labelled, make_args):
    def largest_share(alpha):
        args = make_args(partition="dirichlet", partition_column="lang", dirichlet_alpha=alpha, num_clients=3)
        parts = partition_dataset(labelled, args)
        return max(part["lang"].count(lang) / 100 for part in parts.values() for lang in ("c", "java", "rust"))

    assert largest_share(0.05) > 0.8
    assert largest_share(1000.0) < 0.45


@pytest.mark.parametrize("of_a_label", [1, 2, 3])
def test_dirichlet_deals_labels_with_few_examples_to_all(make_args, of_a_label):
    """Each client has its share on average: 100 of 300, with a standard deviation of 8 at most at this alpha."""
    dataset = Dataset.from_dict({"text": ["t"] * 300, "lang": [str(i // of_a_label) for i in range(300)]})
    for seed in range(3):
        args = make_args(
            partition="dirichlet", partition_column="lang", dirichlet_alpha=100.0, num_clients=3, seed=seed
        )
        assert all(60 < len(part) < 140 for part in partition_dataset(dataset, args).values())


def test_by_column_names_clients_after_the_values(labelled, make_args):
    parts = partition_dataset(labelled, make_args(partition="by-column", partition_column="lang"))
    assert list(parts) == ["c", "java", "rust"]
    assert set(parts["java"]["lang"]) == {"java"}


def test_unknown_column(labelled, make_args):
    with pytest.raises(ValueError, match="`partition_column` is 'language', but .* columns text, lang"):
        partition_dataset(labelled, make_args(partition="by-column", partition_column="language"))


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_more_clients_than_examples(labelled, make_args, partition):
    args = make_args(partition=partition, partition_column="lang", num_clients=4)
    with pytest.raises(ValueError, match="`num_clients` is 4, but `train_dataset` has only 3 examples"):
        partition_dataset(labelled.select(range(3)), args)


@pytest.mark.parametrize(
    "client_datasets, train_dataset, message",
    [
        (None, None, "Pass one of `client_datasets` and `train_dataset`; neither was given"),
        ({"a": sums(0, 2)}, sums(0, 2), "both were given"),
        ({}, None, "`client_datasets` is empty"),
        ([("a", sums(0, 2)), ("b", sums(0, 2)), ("a", sums(0, 2))], None, r"has the name\(s\) a more than once"),
        ({"a": sums(0, 2), "b": sums(0, 0)}, None, "The dataset of client 'b' is empty"),
        ({"a": sums(0, 2), "b": Dataset.from_dict({"text": ["x"]})}, None, "mixes prompt-completion data"),
    ],
    ids=["neither", "both", "no client", "duplicate", "empty", "mixed"],
)
def test_client_datasets_are_checked(make_args, client_datasets, train_dataset, message):
    with pytest.raises(ValueError, match=message):
        name_client_datasets(client_datasets, train_dataset, make_args())
