"""Split one dataset among simulated clients."""

from collections import defaultdict

import numpy as np
from datasets import Dataset

from .config import FedBiOTConfig


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
