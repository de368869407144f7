"""
The sets that the recipe's tasks are made of, read from the Hugging Face Hub or from JSON lines files in a folder, in the
same columns.
"""

from collections.abc import Callable
from pathlib import Path

from datasets import load_dataset


Rows = list[dict]


def hub(name: str, config: str | None, *splits: str) -> Rows:
    return [row for split in splits for row in load_dataset(name, config, split=split)]


def word_problems_train() -> Rows:
    rows = hub("MU-NLPC/Calc-mawps", "original-splits", "train", "validation", "test")
    return [{"question": row["question"], "answer": f"{row['result_float']:.10g}"} for row in rows]


def svamp_test() -> Rows:
    """Both splits: the set was made to test models that learned from others."""
    rows = hub("ChilleD/SVAMP", None, "train", "test")
    return [
        {"question": f"{row['Body'].strip().rstrip('.')}. {row['Question']}", "answer": f"{float(row['Answer']):.10g}"}
        for row in rows
    ]


def xquad_en() -> Rows:
    """Its questions are SQuAD's, where each has the title of its article."""
    article = {row["id"]: row["title"] for row in hub("rajpurkar/squad", None, "validation")}
    return [
        {
            "article": article[row["id"]],
            "context": row["context"],
            "question": row["question"],
            "answer": row["answers"]["text"][0],
        }
        for row in hub("google/xquad", "xquad.en", "validation")
    ]


def medquad() -> Rows:
    """Three of its sources came without answers."""
    return [
        {
            "institute": row["document_source"],
            "focus": row["question_focus"],
            **{k: row[k] for k in ("question", "answer")},
        }
        for row in hub("lavita/MedQuAD", None, "train")
        if row["answer"]
    ]


# The names are those of the files in a folder.
HUB: dict[str, Callable[[], Rows]] = {
    "word_problems_train": word_problems_train,
    "svamp_test": svamp_test,
    "gsm8k_train": lambda: hub("openai/gsm8k", "main", "train"),
    "gsm8k_test": lambda: hub("openai/gsm8k", "main", "test"),
    "xquad_en": xquad_en,
    "medquad": medquad,
    "codealpaca": lambda: hub("sahil2801/CodeAlpaca-20k", None, "train"),
    "instructions": lambda: hub("tatsu-lab/alpaca", None, "train"),
}


def read(name: str, folder: Path | None) -> Rows:
    """
    The rows of a set, from `<folder>/<name>.jsonl` or else from the Hub.

    Raises:
        FileNotFoundError: If the folder lacks it.
    """
    if folder is None:
        return HUB[name]()
    file = folder / f"{name}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"`--from` is '{folder}', which has no {file.name}. Add it, or leave the flag out: the set then comes from the "
            "Hugging Face Hub."
        )
    return list(load_dataset("json", data_files=str(file), split="train"))
