"""Where texts come from: files, folders and the Hub, brought into one form, and held out."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset


DATA_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_dataset(name: str, config: str | None, split: str) -> Dataset:
    """Load one dataset: all of a file, or a split of what is on the Hub or in a folder."""
    kind = DATA_FILES.get(Path(name).suffix)
    if kind is None:
        return load_dataset(name, config, split=split)
    if not name.startswith("https://") and not Path(name).is_file():
        raise FileNotFoundError(f"There is no file '{name}'.")
    return load_dataset(kind, data_files=name, split="train")


def rows_by_value(dataset: Dataset, column: str) -> dict[str, list[int]]:
    """Which rows have which value in `column`. Raises `ValueError` if there is no such column."""
    if column not in dataset.column_names:
        raise ValueError(
            f"`partition_column` is '{column}', but `dataset_name` has the columns {', '.join(dataset.column_names)}."
        )
    rows = defaultdict(list)
    for row, value in enumerate(dataset[column]):
        rows[str(value)].append(row)
    return rows


def keep_values(dataset: Dataset, column: str, values: list[str]) -> Dataset:
    """The examples with one of `values` in `column`."""
    rows = rows_by_value(dataset, column)
    missing = [value for value in values if value not in rows]
    if missing:
        found = ", ".join(sorted(rows)[:20]) + (", ..." if len(rows) > 20 else "")
        raise ValueError(
            f"`partition_values` has {', '.join(missing)}, but no example has that in `{column}`. There is: {found}."
        )
    return dataset.select(sorted(row for value in set(values) for row in rows[value]))


def hold_out(dataset: Dataset, fraction: float, column: str | None, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `fraction` of the examples, of each value of `column` if one is given: training and held-out set."""
    rows = {"all": list(range(len(dataset)))} if column is None else rows_by_value(dataset, column)
    rng = np.random.default_rng(seed)
    heldout: list[int] = []
    for value, of_value in rows.items():
        count = round(fraction * len(of_value))
        if not 0 < count < len(of_value):
            raise ValueError(
                f"`eval_fraction` is {fraction}, which holds out {count} of the {len(of_value)} examples of '{value}'. "
                "Change it so that some are held out and some are left, or keep other values with `partition_values`."
            )
        heldout.extend(rng.permutation(of_value)[:count].tolist())
    return dataset.select(sorted(set(range(len(dataset))).difference(heldout))), dataset.select(sorted(heldout))


def to_examples(dataset: Dataset, templates: tuple, limit: int | None, seed: int) -> Dataset:
    """Draw `limit` examples and bring them into prompt-completion form if there are templates."""
    if limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    prompt, completion = templates
    if prompt is not None:
        dataset = dataset.map(
            lambda row: {"prompt": prompt.format(**row), "completion": completion.format(**row)},
            desc="Formatting",
        )
    return dataset
