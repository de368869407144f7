"""Which client holds which text."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset

from ..config import FedBiOTConfig


def name_client_datasets(
    client_datasets: Mapping[str, Dataset] | Sequence[tuple[str, Dataset]] | None,
    train_dataset: Dataset | None,
    args: FedBiOTConfig,
) -> dict[str, Dataset]:
    """
    The dataset of each client: those that are given, or `train_dataset` split among clients.

    Raises:
        ValueError: If not exactly one of the two is given, a name stands twice, a dataset is empty, or the datasets are
            of different forms so that it is open which tokens to train on.
    """
    if (client_datasets is None) == (train_dataset is None):
        given = "neither" if client_datasets is None else "both"
        raise ValueError(f"Pass one of `client_datasets` and `train_dataset`; {given} was given.")
    if client_datasets is None:
        return partition_dataset(train_dataset, args)
    pairs = list(client_datasets.items() if isinstance(client_datasets, Mapping) else client_datasets)
    names = [name for name, _ in pairs]
    if not pairs:
        raise ValueError("`client_datasets` is empty: a federation needs at least one client.")
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(
            f"`client_datasets` has the name(s) {', '.join(duplicates)} more than once. Names must differ."
        )
    for name, dataset in pairs:
        if len(dataset) == 0:
            raise ValueError(f"The dataset of client '{name}' is empty.")
    forms = {name: "completion" in dataset.column_names for name, dataset in pairs}
    if args.completion_only_loss is None and len(set(forms.values())) > 1:
        raise ValueError(
            "`client_datasets` mixes prompt-completion data with other text "
            f"({', '.join(name for name, form in forms.items() if form)} have completions, the others do not), so it is "
            "open which tokens count. Set `completion_only_loss`, or bring all clients into one form."
        )
    return dict(pairs)


def partition_dataset(dataset: Dataset, args: FedBiOTConfig) -> dict[str, Dataset]:
    """
    Split `dataset` as `args.partition` says. Every example goes to exactly one client.

    Args:
        dataset ([`~datasets.Dataset`]): The examples of all clients.
        args ([`FedBiOTConfig`]): `partition`, `num_clients`, `partition_column`, `dirichlet_alpha` and `seed` are read.

    Returns:
        `dict[str, Dataset]`: A dataset per client, `"client-0"`, ... or, by column, under the column's values.

    Raises:
        ValueError: If there are fewer examples than clients, or the column does not exist.
    """
    rng = np.random.default_rng(args.seed)
    if args.partition == "iid":
        _check_enough(dataset, args.num_clients)
        shards = np.array_split(rng.permutation(len(dataset)), args.num_clients)
        return {f"client-{i}": dataset.select(np.sort(shard)) for i, shard in enumerate(shards)}

    by_value = _group(dataset, args.partition_column)
    if args.partition == "by-column":
        return {str(value): dataset.select(indices) for value, indices in sorted(by_value.items(), key=_name)}

    _check_enough(dataset, args.num_clients)
    shards = _dirichlet(list(by_value.values()), args.num_clients, args.dirichlet_alpha, rng)
    return {f"client-{i}": dataset.select(sorted(shard)) for i, shard in enumerate(shards)}


def _name(item):
    return str(item[0])


def _check_enough(dataset, num_clients):
    if len(dataset) < num_clients:
        raise ValueError(
            f"`num_clients` is {num_clients}, but `train_dataset` has only {len(dataset)} examples. Every client needs "
            "at least one."
        )


def _group(dataset, column) -> dict[object, list[int]]:
    if column not in dataset.column_names:
        raise ValueError(
            f"`partition_column` is '{column}', but `train_dataset` has the columns {', '.join(dataset.column_names)}."
        )
    groups = defaultdict(list)
    for index, value in enumerate(dataset[column]):
        groups[value].append(index)
    return dict(groups)


def _dirichlet(groups: list[list[int]], num_clients: int, alpha: float, rng) -> list[list[int]]:
    """Shares of each label drawn from `Dir(alpha)`; a client left without examples takes one from the largest."""
    shards: list[list[int]] = [[] for _ in range(num_clients)]
    for indices in groups:
        shares = rng.dirichlet([alpha] * num_clients)
        cuts = (np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for shard, part in zip(shards, np.split(rng.permutation(indices), cuts), strict=True):
            shard.extend(part.tolist())
    for shard in shards:
        if not shard:
            shard.append(max(shards, key=len).pop())
    return shards
