"""What datasets of text look like: forms that can be trained on, rows that cannot, tokens that count."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase


BATCH = 10_000  # rows
ROWS_ARE_DICTS = (None, "torch", "numpy", "custom")  # formats of a dataset
IGNORED = -100  # label of a token that is not trained on


def check_texts(dataset: Dataset, name: str, text_field: str = "text"):
    """
    Check that every row of a dataset is text.

    Args:
        dataset ([`~datasets.Dataset`]): Text in any form that [`~trl.SFTTrainer`] takes, or tokenized.
        name (`str`): What errors call it.
        text_field (`str`, *optional*, defaults to `"text"`): Column of text that is neither a prompt nor a conversation.

    Raises:
        TypeError: If it is no `Dataset`, or a column holds something else than text, or than lists of tokens.
        ValueError: If it has no row, none of the forms, a format without dicts for rows, or a row is empty (`None`; an empty
            string is text), or has other labels than tokens.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{subject(name)} must be a `datasets.Dataset`, got {type(dataset).__name__}. {_way_to_dataset(dataset)}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{subject(name)} is empty: it has no row.")
    kind = dataset.format["type"]
    if kind not in ROWS_ARE_DICTS:
        raise ValueError(
            f"{subject(name)} has the format '{kind}', in which a row is no dict. Pass it `.with_format(None)`."
        )
    columns = text_columns(dataset, name, text_field)
    for column in columns:
        _check_column(dataset, name, column)
    if not columns:
        _check_tokens(dataset, name)


def subject(name: str) -> str:
    """How an error begins that is about the argument or the client `name`."""
    return name if name.startswith("`") else f"The dataset of {name}"


def _way_to_dataset(given) -> str:
    if isinstance(given, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(str, given))
        return f"It has the splits {splits}: pick one, as in `dataset['{next(iter(given), 'train')}']`."
    if isinstance(given, IterableDataset):
        return "A run needs to know where in the data it is, which a stream cannot tell: load it without streaming."
    return "`Dataset.from_list` makes one of rows."


def text_columns(dataset: Dataset, name: str, text_field: str = "text") -> tuple[str, ...]:
    """
    The columns with the text of a dataset, what is trained on last; none if it is tokenized.

    Raises:
        ValueError: If it has none of the forms.
    """
    columns = dataset.column_names
    if "input_ids" in columns:
        return ()
    for form in (("prompt", "completion"), ("messages",), ("conversations",), (text_field,)):
        if all(column in columns for column in form):
            return form
    raise ValueError(
        f"{subject(name)} has the columns {', '.join(columns)}, but it needs `{text_field}`, `messages`, or "
        "`prompt` and `completion`. Make them with `Dataset.map` or, on the command line, with a prompt template and a "
        "completion template."
    )


def is_conversational(dataset: Dataset, columns: tuple[str, ...]) -> bool:
    """Whether the text in `columns` is messages."""
    return bool(columns) and _is_list(dataset.data.schema.field(columns[-1]).type)


def check_chat_template(dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"):
    """Raise `ValueError` if a dataset is a conversation and the tokenizer cannot write one."""
    if tokenizer.chat_template is None and is_conversational(dataset, text_columns(dataset, name, text_field)):
        raise ValueError(
            f"{subject(name)} is a conversation, but `processing_class` has no chat template. Name one with "
            "`chat_template_path` (a .jinja file, or a tokenizer without tokens of its own)."
        )


def without_other_forms(dataset: Dataset, name: str, text_field: str = "text") -> Dataset:
    """
    Leave out columns that are not of the dataset's form: other text, one of which TRL would put end tokens into instead, and
    what belongs to tokens alone, which it would keep beside those it makes (`labels` are often classes).
    """
    used = text_columns(dataset, name, text_field)
    known = {"prompt", "completion", "messages", "conversations", text_field, "labels", "assistant_masks"}
    others = [column for column in dataset.column_names if column in known.difference(used)]
    return dataset.remove_columns(others) if used and others else dataset


def _check_column(dataset, name, column):
    kind = dataset.data.schema.field(column).type
    if _is_list(kind):
        find, problem = _first_bad_conversation, "has no messages (each a `role` and a `content` that is text)"
    elif _is_string(kind) or pa.types.is_null(kind):
        find, problem = _first_null, "has no text"
    elif isinstance(kind, pa.BaseExtensionType):  # JSON of any kind
        for row, value in enumerate(dataset[column]):
            if not isinstance(value, str) and not (value and isinstance(value, list)):
                raise ValueError(
                    f"{subject(name)} has {value!r:.50} in row {row}, column `{column}`, which is no text. Turn it into text."
                )
        return
    else:
        raise TypeError(
            f"{subject(name)} has {kind} in column `{column}` from row 0 on, which is no text. Turn it into text, as in "
            f"`dataset.cast_column('{column}', Value('string'))`, or on the command line with a template."
        )
    start = 0
    for batch in _batches(dataset, column):
        row = find(batch)
        if row is not None:
            raise ValueError(
                f"{subject(name)} {problem} in row {start + row}, column `{column}`. Fill it, or leave the row out with "
                "`Dataset.filter`."
            )
        start += len(batch)


def _check_tokens(dataset, name):
    """Whether each row is whole numbers, with as many labels, if there are any."""
    columns = [column for column in ("input_ids", "labels") if column in dataset.column_names]
    for column in columns:
        kind = dataset.data.schema.field(column).type
        if not _is_list(kind) or not pa.types.is_integer(kind.value_type):
            raise TypeError(
                f"{subject(name)} has {kind} in column `{column}`, which is no list of tokens. Tokenize the text, or leave "
                "`input_ids` out."
            )
    start = 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(BATCH):
        lengths = [pc.list_value_length(batch[column]) for column in columns]
        wrong = {column: pc.is_null(length) for column, length in zip(columns, lengths, strict=True)}
        if len(columns) == 2:
            wrong["labels"] = pc.or_(wrong["labels"], pc.not_equal(lengths[0], lengths[1]))
        for column, mask in wrong.items():
            row = _first(mask)
            if row is not None:
                problem = "no list" if column == "input_ids" else "no list as long as `input_ids`"
                raise ValueError(f"{subject(name)} has {problem} in row {start + row}, column `{column}`.")
        start += len(batch)


def token_bounds(dataset: Dataset) -> tuple[int, int]:
    """The smallest and the largest token of a tokenized dataset; 0 and 0 if it has none."""
    found = [pc.min_max(pc.list_flatten(ids)).as_py() for ids in _batches(dataset, "input_ids")]
    found = [bounds for bounds in found if bounds["min"] is not None]
    return min((b["min"] for b in found), default=0), max((b["max"] for b in found), default=0)


def without_labels(dataset: Dataset) -> Dataset:
    """Tokens alone, of which every one counts; text is as it was."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return dataset
    known = ("labels", "completion_mask", "assistant_masks")
    return dataset.remove_columns([column for column in known if column in dataset.column_names])


def _is_string(kind) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _batches(dataset, column) -> Iterator[pa.Array]:
    """A column as Arrow arrays, in the order of the rows."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(BATCH):
        yield from (chunk for chunk in table[column].chunks if len(chunk))


def _first(mask) -> int | None:
    index = pc.index(mask, True).as_py()
    return None if index < 0 else index


def _first_null(texts) -> int | None:
    return _first(pc.is_null(texts))


def _first_bad_conversation(conversations) -> int | None:
    """The first one that is empty, or has a message without a role or text."""
    row = _first(pc.fill_null(pc.equal(pc.list_value_length(conversations), 0), True))
    if row is not None:
        return row
    messages, parents = pc.list_flatten(conversations), pc.list_parent_indices(conversations)
    if not pa.types.is_struct(messages.type):
        return 0
    keys = [field.name for field in messages.type]
    for role, content in (("role", "content"), ("from", "value")):
        if role not in keys or not (content in keys or "tool_calls" in keys):
            continue
        bad = pc.is_null(pc.struct_field(messages, role))
        if content in keys and "tool_calls" not in keys:  # a message that calls a tool needs no text
            texts = pc.struct_field(messages, content)
            if not (_is_string(texts.type) or _is_list(texts.type)):
                return 0
            bad = pc.or_(bad, pc.is_null(texts))
        message = _first(bad)
        return None if message is None else parents[message].as_py()
    return 0


def blank_rows(dataset: Dataset, columns: tuple[str, ...]) -> set[int]:
    """The rows in which all of `columns` are white space. Conversations are not."""
    blank = np.ones(len(dataset), dtype=bool)
    for column in columns:
        if not _is_string(dataset.data.schema.field(column).type):
            return set()
        found = [pc.equal(pc.utf8_trim_whitespace(texts), "") for texts in _batches(dataset, column)]
        blank &= np.concatenate([mask.to_numpy(zero_copy_only=False) for mask in found])
    return set(np.flatnonzero(blank).tolist()) if columns else set()


def trained_tokens(dataset: Dataset, max_length: int | None = None) -> np.ndarray:
    """
    Tokens of each row of a tokenized dataset that a causal LM is trained on, within its first `max_length` tokens: those
    with a label, the first one excepted, which nothing predicts.

    Returns:
        `np.ndarray`: Of shape `(num_rows,)`.
    """
    counts = []
    for labels in _batches(dataset, "labels"):
        offsets, counted = labels.offsets.to_numpy(), labels.values.to_numpy() != IGNORED
        place = np.arange(len(counted))
        place[offsets[0] : offsets[-1]] -= np.repeat(offsets[:-1], np.diff(offsets))
        counted &= (place > 0) & (place < (max_length or np.inf))
        ends = np.concatenate([[0], np.cumsum(counted)])
        counts.append(ends[offsets[1:]] - ends[offsets[:-1]])
    return np.concatenate(counts) if counts else np.zeros(0, dtype=int)


def draw_texts(dataset: Dataset, number: int, seed: int) -> Dataset:
    """Some texts of a tokenized dataset, `number` at most, each alone in its row also where texts are packed."""
    rows = np.random.default_rng(seed).permutation(len(dataset))[:number]
    drawn = dataset.select(rows)
    if "seq_lengths" not in dataset.column_names:
        return drawn.select_columns(["input_ids", "labels"])
    texts = []
    for row in drawn:
        ends = np.cumsum(row["seq_lengths"]).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            texts.append({name: row[name][start:end] for name in ("input_ids", "labels")})
    return Dataset.from_list(texts[:number])


def token_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each text of a tokenized dataset; where texts are packed, those of each text in a row, one after another."""
    if "seq_lengths" in dataset.column_names:
        parts = [pc.list_flatten(lengths).to_numpy() for lengths in _batches(dataset, "seq_lengths")]
    else:
        parts = [pc.list_value_length(ids).to_numpy() for ids in _batches(dataset, "input_ids")]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=int)
