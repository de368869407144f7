"""Which client holds which text."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from datasets import Dataset

from ..config import FedBiOTConfig
from ..shared.texts import check_texts, is_conversational, text_columns


def name_client_datasets(
    client_datasets: Mapping[Any, Dataset] | Sequence[tuple[Any, Dataset]] | None,
    train_dataset: Dataset | None,
    args: FedBiOTConfig,
) -> dict[str, Dataset]:
    """
    The dataset of each client: those that are given, or `train_dataset` split among clients. Numbers become names.

    Raises:
        TypeError: If a dataset is no `Dataset` (a `DatasetDict`, a stream) or holds no text, or a name is no `str`.
        ValueError: If not exactly one of the two is given, a name stands twice, a dataset is empty or has rows that are
            no text, or the datasets are of different forms so that it is open which tokens to train on.
    """
    if (client_datasets is None) == (train_dataset is None):
        given = "neither was" if client_datasets is None else "both were"
        raise ValueError(f"Pass one of `client_datasets` and `train_dataset`; {given} given.")
    if client_datasets is None:
        check_texts(train_dataset, "`train_dataset`", args.dataset_text_field)
        return partition_dataset(train_dataset, args)
    pairs = _named_pairs(client_datasets)
    for name, dataset in pairs:
        check_texts(dataset, f"client '{name}'", args.dataset_text_field)
    columns = {name: text_columns(dataset, name, args.dataset_text_field) for name, dataset in pairs}
    if args.assistant_only_loss:
        for name, (dataset, used) in {name: (dataset, columns[name]) for name, dataset in pairs}.items():
            if used and not is_conversational(dataset, used):
                raise ValueError(
                    f"`assistant_only_loss` is True, but the dataset of client '{name}' is no conversation (it has "
                    f"{', '.join(used)}). Leave it out, or bring the dataset into messages."
                )
    forms = {name: "completion" in used for name, used in columns.items() if used}
    if args.completion_only_loss is None and len(set(forms.values())) > 1:
        raise ValueError(
            "`client_datasets` mixes prompt-completion data with other text "
            f"({', '.join(name for name, form in forms.items() if form)} have completions, the others do not), so it is "
            "open which tokens count. Set `completion_only_loss`, or bring all clients into one form."
        )
    return dict(pairs)


def _named_pairs(client_datasets) -> list[tuple[str, Dataset]]:
    if isinstance(client_datasets, Dataset) or not isinstance(client_datasets, Mapping | Sequence):
        raise TypeError(
            f"`client_datasets` is a `{type(client_datasets).__name__}`, but it must be a dict of a dataset for each "
            "client. Pass a dataset to be split among clients as `train_dataset`."
        )
    pairs = list(client_datasets.items() if isinstance(client_datasets, Mapping) else client_datasets)
    if not pairs:
        raise ValueError("`client_datasets` is empty: a federation needs at least one client.")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"`client_datasets` has a {type(pair).__name__} that is no pair of a name and a dataset. Name each client: "
                "`{'a': dataset, ...}`."
            )
    for name, _ in pairs:
        if not isinstance(name, str | Integral) or isinstance(name, bool) or not str(name).strip():
            raise TypeError(
                f"`client_datasets` has the name {name!r}, but clients are named by text or a number. Give it another."
            )
    names = [str(name) for name, _ in pairs]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(
            f"`client_datasets` has the name(s) {', '.join(duplicates)} more than once. Names must differ."
        )
    return [(str(name), dataset) for name, dataset in pairs]


def partition_dataset(dataset: Dataset, args: FedBiOTConfig) -> dict[str, Dataset]:
    """
    Split `dataset` as `args.partition` says. Every example goes to exactly one client.

    Args:
        dataset ([`~datasets.Dataset`]): The examples of all clients.
        args ([`FedBiOTConfig`]): `partition`, `num_clients`, `partition_column`, `dirichlet_alpha` and `seed` are read.

    Returns:
        `dict[str, Dataset]`: A dataset per client, `"client-0"`, ... or, by column, under the column's values.

    Raises:
        ValueError: If there are fewer examples than clients, the column does not exist, or a row has no value in it.
    """
    rng = np.random.default_rng(args.seed)
    if args.partition == "iid":
        _check_enough(dataset, args.num_clients)
        shards = np.array_split(rng.permutation(len(dataset)), args.num_clients)
        return {f"client-{i}": dataset.select(np.sort(shard)) for i, shard in enumerate(shards)}

    by_value = rows_by_value(dataset, args.partition_column, "train_dataset")
    missing = by_value.pop(None, [])
    if missing:
        raise ValueError(
            f"`partition_column` is '{args.partition_column}', which is empty in {len(missing)} of the {len(dataset)} rows "
            f"of `train_dataset` ({', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}), so it is open "
            "whose they are. Fill them, or leave them out (`Dataset.filter`, or `partition_values` on the command line)."
        )
    if args.partition == "by-column":
        return {value: dataset.select(by_value[value]) for value in sorted(by_value)}

    _check_enough(dataset, args.num_clients)
    drawn = _dirichlet(list(by_value.values()), args.num_clients, args.dirichlet_alpha, rng)
    return {f"client-{i}": dataset.select(sorted(rows)) for i, rows in enumerate(drawn)}


def _check_enough(dataset, num_clients):
    if len(dataset) < num_clients:
        raise ValueError(
            f"`num_clients` is {num_clients}, but `train_dataset` has only {len(dataset)} examples. Every client needs "
            "at least one."
        )


def rows_by_value(dataset: Dataset, column: str | None, name: str) -> dict[Any, list[int]]:
    """
    Which rows have which value in `column`; those without one (`None`, NaN, an empty text) are under `None`.

    Raises:
        ValueError: If there is no such column, or its values are no labels.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"`partition_column` is '{column}', but `{name}` has the columns {', '.join(dataset.column_names)}."
        )
    rows = defaultdict(list)
    for row, value in enumerate(dataset[column]):
        if isinstance(value, list | dict):
            raise ValueError(
                f"`partition_column` is '{column}', but row {row} of `{name}` has {value!r:.50} there, which is no label. "
                "Use a column of text or numbers."
            )
        missing = value is None or value != value or (isinstance(value, str) and not value.strip())
        rows[None if missing else str(value)].append(row)
    return dict(rows)


def _dirichlet(groups: list[list[int]], num_clients: int, alpha: float, rng) -> list[list[int]]:
    """
    Shares of each label drawn from `Dir(alpha)`; a client left without examples takes one from the largest.

    Where examples are not divisible by shares, one offset for all cuts decides (systematic sampling), so that each client
    gets its share on average also of labels with few examples.
    """
    shards: list[list[int]] = [[] for _ in range(num_clients)]
    for indices in groups:
        shares = rng.dirichlet([alpha] * num_clients)
        cuts = (np.cumsum(shares)[:-1] * len(indices) + rng.random()).astype(int)
        for shard, part in zip(shards, np.split(rng.permutation(indices), cuts), strict=True):
            shard.extend(part.tolist())
    for shard in shards:
        if not shard:
            shard.append(max(shards, key=len).pop())
    return shards
