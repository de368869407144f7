"""Where texts come from: files, folders and the Hub, brought into one form, and held out."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlparse

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .names import COMPRESSED, DATA_FILES, check_path, file_kind, template_columns
from .partition import rows_by_value


NOT_SPACE = re.compile(r"\S")


def read_dataset(name: str, config: str | None, split: str) -> Dataset:
    """
    Load one dataset: all of a file, or a split of what is on the Hub or in a folder. Cells of .csv and .tsv files are
    text as it stands there: an empty one is an empty text, and "N/A" or "007" are what they are. In .json and
    .jsonl files dates are text too, and so are numbers where whole ones and decimals stand in one column.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If a file is of another kind, cannot be read, or has no row.
    """
    check_path(name)
    suffix = file_kind(name)
    if suffix is None:
        return _read_other(name, config, split)
    path = name if "://" in name else str(Path(name).expanduser())
    try:
        options = _text_cells(path, suffix) if DATA_FILES[suffix] == "csv" else {}
        dataset = load_dataset(DATA_FILES[suffix], data_files=path, split="train", **options)
        if DATA_FILES[suffix] == "json":
            dataset = _as_written(dataset, path)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration | pd.errors.EmptyDataError) or re.search(
            "at least one ex|no data", str(cause)
        ):
            raise ValueError(f"'{name}' has no row.") from error
        raise ValueError(f"'{name}' cannot be read as {suffix} ({cause}).") from error
    if len(dataset) == 0:
        raise ValueError(f"'{name}' has no row.")
    return dataset


def _text_cells(path: str, suffix: str) -> dict:
    """Options of the reader of tables. It would guess types by what is in the first rows."""
    options = {"sep": "\t" if suffix == ".tsv" else ","}
    head = pd.read_csv(path, nrows=1, compression=_compression(path), **options)
    if len(head) and not isinstance(head.index, pd.RangeIndex):  # pandas takes the first cells as names of rows
        raise ValueError(
            f"its first row has more cells than there are columns: {', '.join(head.columns)}. Name them all in the first line"
        )
    features = Features({column: Value("string") for column in head.columns})
    return {**options, "na_filter": False, "features": features}


def _compression(path: str) -> str | None:
    return COMPRESSED.get(Path(urlparse(path).path).suffix.lower())


def _as_written(dataset: Dataset, path: str) -> Dataset:
    """The rows of a JSON file, with text again where its reader made times of text, or decimals of whole numbers."""
    columns = {field.name: field.type for field in dataset.data.schema}
    times = {name for name, kind in columns.items() if _is_time(kind)}
    decimals = {
        name for name, kind in columns.items() if pa.types.is_floating(kind) and _has_whole(dataset.data[name])
    }
    changed: dict[str, list] = {name: [] for name in columns if name in times | decimals}
    if not changed:
        return dataset
    with fsspec.open(path, "rt", compression=_compression(path), encoding="utf-8-sig") as file:
        for row in _json_rows(file):
            for name, cells in changed.items():
                cells.append(row.get(name) if isinstance(row, dict) else None)
    for name, cells in changed.items():
        if len(cells) == len(dataset) and (name in times or any(isinstance(cell, int) for cell in cells)):
            cells = [None if cell is None else str(cell) for cell in cells]
            dataset = dataset.remove_columns(name).add_column(name, cells, feature=Value("string"))
    return dataset.select_columns(list(columns))


def _has_whole(numbers: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.equal(pc.floor(numbers), numbers)).as_py())


def _json_rows(file: TextIO) -> Iterator[Any]:
    """What JSON lines hold, or one after another the values of a file, those of its lists each; decimals as text."""
    decoder = json.JSONDecoder(parse_float=str)
    for line in filter(str.strip, file):
        try:
            values = [decoder.decode(line)]
        except json.JSONDecodeError:  # a value goes on in the next line
            values, text, start = [], line + file.read(), 0
            while found := NOT_SPACE.search(text, start):
                value, start = decoder.raw_decode(text, found.start())
                values.append(value)
        for value in values:
            yield from value if isinstance(value, list) else [value]


def _read_other(name, config, split) -> Dataset:
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file():
        splits = DatasetDict.load_from_disk(str(path))
        if split not in splits:
            raise _no_split(name, split, f"It has: {', '.join(splits)}.")
        return splits[split]
    if (path / "state.json").is_file():
        return Dataset.load_from_disk(str(path))
    try:
        dataset = load_dataset(str(path) if path.is_dir() else name, config, split=split)
    except ValueError as error:
        if "Unknown split" in str(error):
            raise _no_split(name, split, str(error)) from error
        raise
    if len(dataset) == 0:
        raise ValueError(f"The split '{split}' of '{name}' has no row.")
    return dataset


def _no_split(name: str, split: str, found: str) -> ValueError:
    return ValueError(
        f"'{name}' has no split '{split}'. {found} Name one with `dataset_train_split`, and with `dataset_test_split` for "
        "evaluation, or hold out of one with `eval_fraction`."
    )


def keep_values(dataset: Dataset, column: str, values: list[str]) -> Dataset:
    """The examples with one of `values` in `column`."""
    rows = rows_by_value(dataset, column, "dataset_name")
    rows.pop(None, None)  # no value is none that can be named
    missing = [value for value in values if value not in rows]
    if missing:
        found = ", ".join(sorted(rows)[:20]) + (", ..." if len(rows) > 20 else "")
        raise ValueError(
            f"`partition_values` has {', '.join(missing)}, but no example has that in `{column}`. There is: {found}."
        )
    return dataset.select(sorted(row for value in set(values) for row in rows[value]))


def hold_out(dataset: Dataset, fraction: float, column: str | None, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `fraction` of the examples, of each value of `column` if one is given: training and held-out set."""
    rows = {"all": list(range(len(dataset)))} if column is None else rows_by_value(dataset, column, "dataset_name")
    rng = np.random.default_rng(seed)
    heldout: list[int] = []
    empty = next((of_value for value, of_value in rows.items() if value is None), [])
    if empty:
        raise ValueError(
            f"`partition_column` is '{column}', which is empty in {len(empty)} of the {len(dataset)} rows, so "
            "`eval_fraction` cannot hold out of each value. Fill them, or leave them out with `partition_values`."
        )
    for value, of_value in rows.items():
        count = round(fraction * len(of_value))
        if not 0 < count < len(of_value):
            raise ValueError(
                f"`eval_fraction` is {fraction}, which holds out {count} of the {len(of_value)} examples of '{value}'. "
                "Change it so that some are held out and some are left, or keep other values with `partition_values`."
            )
        heldout.extend(rng.permutation(of_value)[:count].tolist())
    return dataset.select(sorted(set(range(len(dataset))).difference(heldout))), dataset.select(sorted(heldout))


def to_examples(
    dataset: Dataset,
    templates: tuple[str | None, str | None],
    limit: int | None,
    seed: int,
    source: str,
    flag: str = "prompt_template",
) -> Dataset:
    """
    Draw `limit` examples and bring them into prompt-completion form if there are templates. A cell without a value is an
    empty text.

    Raises:
        ValueError: If a template names a column that is not there, or that is not any more what it was in its file. It calls
            the dataset `source`, the first template `flag`.
    """
    if limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    prompt, completion = templates
    if prompt is None or completion is None:
        return dataset
    for name, template in ((flag, prompt), (flag.replace("prompt_", "completion_"), completion)):
        unknown = [column for column in template_columns(template, name) if column not in dataset.column_names]
        if unknown:
            raise ValueError(
                f"`{name}` is {template!r}, but '{source}' has no column {', '.join(unknown)}. It has: "
                f"{', '.join(dataset.column_names)}."
            )
        times = [c for c in template_columns(template, name) if _is_time(dataset.data.schema.field(c).type)]
        if times and dataset.info.builder_name == "json":
            raise ValueError(
                f"`{name}` is {template!r}, but the JSON of '{source}' has text in {', '.join(times)} that its reader took for "
                "times, and how it was written is lost. Name a file of JSON lines, or store it as Parquet."
            )

    def fill(row):
        cells = {column: "" if _is_missing(value) else value for column, value in row.items()}
        return {"prompt": prompt.format(**cells), "completion": completion.format(**cells)}

    return dataset.map(fill, desc="Formatting")


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind))


def _is_missing(value) -> bool:
    return value is None or (isinstance(value, float) and value != value)
