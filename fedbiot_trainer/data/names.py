"""Names of datasets and columns, checked without loading anything: no library is imported for it."""

import re
import string
from pathlib import Path
from urllib.parse import urlparse


DATA_FILES = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
KINDS = f"{', '.join(DATA_FILES)}, and these with {', '.join(COMPRESSED)} behind"


def file_kind(name: str) -> str | None:
    """The suffix in `DATA_FILES` of a file or an address, in any case and maybe compressed; `None` for other names."""
    path = Path(urlparse(name).path if "://" in name else name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in DATA_FILES else None


def check_path(name: str):
    """
    Check that a dataset that is named by a path is there and of a kind that is read. Names on the Hub pass.

    Raises:
        FileNotFoundError: If the path leads nowhere.
        ValueError: If it is a file of another kind.
    """
    if "://" in name:
        return
    path = Path(name).expanduser()
    if file_kind(name) is not None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file '{name}'.")
    elif path.is_file():
        raise ValueError(f"'{name}' is a file of a kind that is not read. These are: {KINDS}.")
    elif not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no file or folder '{name}'.")


def has_splits(name: str) -> bool:
    """Whether a dataset is more than one table: a file is one, and so is what `Dataset.save_to_disk` wrote."""
    return file_kind(name) is None and not (Path(name).expanduser() / "state.json").is_file()


def template_columns(template: str, name: str) -> list[str]:
    """
    The columns in braces of a template.

    Args:
        template (`str`): As in "Question: {question}".
        name (`str`): What errors call it.

    Raises:
        ValueError: If its braces do not hold names of columns.
    """
    try:
        names = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(
            f"`{name}` is {template!r}, which is no template ({error}). Write a column as {{column}} and a brace as {{{{."
        ) from error
    columns = [re.split(r"[.\[]", field)[0] for field in names]
    if not all(columns) or any(column.isdigit() for column in columns):
        raise ValueError(f"`{name}` is {template!r}, with braces that name no column. Write a column as {{column}}.")
    return columns
