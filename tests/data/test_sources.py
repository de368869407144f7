import bz2
import gzip
import lzma

import pytest
from conftest import sums
from datasets import Dataset, DatasetDict

from fedbiot_trainer.data.names import check_path, file_kind, has_splits, template_columns
from fedbiot_trainer.data.partition import partition_dataset
from fedbiot_trainer.data.sources import hold_out, keep_values, read_dataset, to_examples


JSONL = b'{"prompt": "1+1=", "completion": "2"}\n' * 2
TEMPLATES = ("{instruction} {input}", " {output}")


def read(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_dataset(str(folder / name), None, "train")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", JSONL),
        ("a.JSONL", JSONL),
        ("a.b.jsonl.gz", gzip.compress(JSONL)),
        ("A.Jsonl.GZ", gzip.compress(JSONL)),
        ("a.jsonl.bz2", bz2.compress(JSONL)),
        ("a.jsonl.xz", lzma.compress(JSONL)),
        ("a.json", b'[{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}]'),
        ("a.csv", "prompt,completion\n1+1=,2\n1+1=,2\n"),
        ("a.CSV.gz", gzip.compress(b"prompt,completion\n1+1=,2\n1+1=,2\n")),
        ("a.tsv", "prompt\tcompletion\n1+1=\t2\n1+1=\t2\n"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_files(tmp_path, name, content):
    assert read(tmp_path, name, content).to_list() == [{"prompt": "1+1=", "completion": "2"}] * 2


def test_parquet_text_and_saved_datasets(tmp_path):
    sums(0, 2).to_parquet(tmp_path / "a.PARQUET")
    sums(0, 2).save_to_disk(tmp_path / "saved")
    DatasetDict(train=sums(0, 2), test=sums(2, 3)).save_to_disk(tmp_path / "splits")
    for name in ("a.PARQUET", "saved", "splits"):
        assert read_dataset(str(tmp_path / name), None, "train").to_list() == sums(0, 2).to_list()
    assert [has_splits(str(tmp_path / name)) for name in ("a.PARQUET", "saved", "splits")] == [False, False, True]
    assert read(tmp_path, "a.txt", "one\n\ntwo\n")["text"][:] == ["one", "", "two"]


def test_cells_are_text_as_it_stands(tmp_path):
    """Also where a column becomes text, or empty, only after the rows that a reader looks at first."""
    rows = [f"{i},x,{i}" for i in range(12_000)] + ["N/A,None,", "007,null,3.10"]
    dataset = read(tmp_path, "a.csv", "\n".join(["a,b,c", *rows]))
    assert dataset[12_000] == {"a": "N/A", "b": "None", "c": ""} and dataset[7]["c"] == "7"
    assert dataset[12_001] == {"a": "007", "b": "null", "c": "3.10"}


@pytest.mark.parametrize("rows", ["Q1,A1,note\nQ2,A2,note", "Q1,A1,\nQ2,A2,", "1,A1,note\n2,A2"])
def test_tables_with_a_cell_more_than_columns(tmp_path, rows):
    """Of which pandas would make names of rows, and shift all cells."""
    with pytest.raises(ValueError, match=r"first row has more cells than there are columns: prompt, completion"):
        read(tmp_path, "a.csv", f"prompt,completion\n{rows}\n")
    with pytest.raises(ValueError, match="Expected 2 fields in line 3, saw 3"):
        read(tmp_path, "a.csv", "prompt,completion\nQ1,A1\nQ2,A2,note\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "pretty.json", "a.jsonl.gz"])
def test_json_is_text_as_it_stands(tmp_path, name):
    rows = [
        '{"date": "2024-01-01", "at": "10:30:00", "n": 1, "half": 0.5, "text": "2024"}',
        '{"date": "2024-01-02 10:00:00", "n": 2.50, "half": 1.50, "text": "\u2028 1"}',
        '{"n": 12345678901234567890, "half": null, "text": "x"}',
    ]
    content = f"\ufeff[{','.join(rows)}]" if name == "a.json" else "\n".join(rows) + "\n\n"
    if name == "pretty.json":
        content = "[\n  " + ",\n  ".join(row.replace(", ", ",\n    ") for row in rows) + "\n]\n"
    dataset = read(tmp_path, name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    assert dataset["date"][:] == ["2024-01-01", "2024-01-02 10:00:00", None]
    assert dataset["n"][:] == ["1", "2.50", "12345678901234567890"]
    assert dataset["half"][:] == [0.5, 1.5, None]  # numbers, which a template may format
    assert dataset["text"][:] == ["2024", "\u2028 1", "x"] and dataset["at"][:] == ["10:30:00", None, None]
    assert dataset.column_names == ["date", "at", "n", "half", "text"]
    assert to_examples(dataset, ("{n}", "{date}"), None, 0, name)["completion"][:2] == dataset["date"][:2]


def test_times_of_which_the_text_is_lost_are_not_written_otherwise(tmp_path):
    """A folder's JSON is read by `datasets` alone; in Parquet a time is one."""
    (tmp_path / "folder").mkdir()
    rows = '{"q": "a", "date": "2024-01-01"}\n{"q": "b", "date": "2024-01-02"}\n'
    (tmp_path / "folder" / "train.jsonl").write_text(rows)
    dataset = read_dataset(str(tmp_path / "folder"), None, "train")
    with pytest.raises(
        ValueError, match="`completion_template` is '{date}', but the JSON of 'a' has text in date that"
    ):
        to_examples(dataset, ("{q}", "{date}"), None, 0, "a")
    assert to_examples(dataset, ("{q}", "{q}"), None, 0, "a")["completion"][:] == ["a", "b"]
    dataset.to_parquet(tmp_path / "a.parquet")
    typed = read_dataset(str(tmp_path / "a.parquet"), None, "train")
    assert to_examples(typed, ("{q}", "{date:%d.%m.}"), None, 0, "a")["completion"][:] == ["01.01.", "02.01."]


@pytest.mark.parametrize("split", ["training", "test"])
def test_splits_that_are_not_there(tmp_path, split):
    DatasetDict(train=sums(0, 2), validation=sums(2, 3)).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_bytes(JSONL)
    for name in ("saved", "folder"):
        with pytest.raises(
            ValueError, match=rf"{name}' has no split '{split}'.*train.*dataset_test_split.*eval_fraction"
        ):
            read_dataset(str(tmp_path / name), None, split)


@pytest.mark.parametrize(
    "name, content",
    [("a.jsonl", ""), ("a.csv", ""), ("a.csv", "prompt,completion\n"), ("a.txt", ""), ("a.json", "[]"), ("a.tsv", "")],
)
def test_files_without_a_row(tmp_path, name, content):
    with pytest.raises(ValueError, match=r"a\.\w+' has no row"):
        read(tmp_path, name, content)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"a.jsonl' cannot be read as .jsonl \(JSON parse error"):
        read(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"a.docx' is a file of a kind that is not read. These are: .json, .* .gz"):
        read(tmp_path, "a.docx", "x")
    for name in ("gone.jsonl", "./gone.CSV", "a/b.txt"):
        with pytest.raises(FileNotFoundError, match=f"There is no file '{name}'"):
            check_path(name)
    for name in ("./gone", "~/gone", "/gone/folder", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"There is no file or folder '{name}'"):
            check_path(name)
    check_path("openai/gsm8k")
    check_path("org/data-v1.5")


def test_kinds_of_addresses():
    assert file_kind("https://host/rows.JSONL.gz?download=true") == ".jsonl"
    assert file_kind("https://host/rows") is None and file_kind("org/data-v1.5") is None


def test_templates_and_cells_without_a_value():
    dataset = Dataset.from_list(
        [
            {"instruction": "Is it open", "input": None, "output": "yes", "n": 1.0},
            {"instruction": "add", "input": "1 2", "output": "N/A", "n": float("nan")},
        ]
    )
    examples = to_examples(dataset, TEMPLATES, None, 0, "a.jsonl")
    assert examples["prompt"][:] == ["Is it open ", "add 1 2"] and examples["completion"][:] == [" yes", " N/A"]
    assert to_examples(dataset, ("{n}", "{n:>4}"), None, 0, "a.jsonl")["prompt"][:] == ["1.0", ""]


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{question}",
            "`public_prompt_template` is '{question}', but 'a.jsonl' has no column question. It has: instr",
        ),
        ("{}", "with braces that name no column"),
        ("{0}", "with braces that name no column"),
        ("{instruction", "which is no template .* a brace as {{"),
        ("a } b", "which is no template"),
    ],
)
def test_templates_that_cannot_be_filled(template, message):
    dataset = Dataset.from_dict({"instruction": ["a"]})
    with pytest.raises(ValueError, match=message):
        to_examples(dataset, (template, "{instruction}"), None, 0, "a.jsonl", "public_prompt_template")


def test_columns_of_a_template():
    assert template_columns("{{x}} {a.b} {c[0]} {d!r:>4}", "t") == ["a", "c", "d"]


def test_values_keep_rows_without_one_out(make_args):
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "lang": ["x", None, "y"]})
    args = make_args(partition="by-column", partition_column="lang")
    kept = keep_values(dataset, "lang", ["x", "y"])
    assert list(partition_dataset(kept, args)) == ["x", "y"]
    with pytest.raises(ValueError, match="`partition_values` has None, but no example has that in `lang`"):
        keep_values(dataset, "lang", ["None"])
    train, heldout = hold_out(concatenated(kept), 0.5, "lang", 0)
    assert sorted(train["lang"]) == sorted(heldout["lang"]) == ["x", "y"]


def concatenated(dataset):
    return Dataset.from_list(dataset.to_list() * 2)


def test_mixed_cells_are_named(tmp_path):
    from fedbiot_trainer.shared.texts import check_texts

    dataset = read(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 2}\n')
    with pytest.raises(
        (TypeError, ValueError), match="client 'a' has 2 in row 1, column `completion`, which is no text"
    ):
        check_texts(dataset, "client 'a'")


def test_rows_without_a_label_are_not_held_out_by_it():
    dataset = Dataset.from_dict({"text": list("abcde"), "lang": ["x", "x", None, "y", "y"]})
    with pytest.raises(ValueError, match="`partition_column` is 'lang', which is empty in 1 of the 5 rows"):
        hold_out(dataset, 0.5, "lang", 0)
