import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset


RECIPES = Path(__file__).parents[2] / "recipes"
PREPARE = str(RECIPES / "code" / "prepare.py")
NAMES = {"cpp": "C++", "java": "Java", "javascript": "JavaScript", "python": "Python"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def instructions():
    """Seven rows that name each language, one that names two, one that names another, and two with known texts."""
    rows = [
        {"instruction": f"Write a {name} program, number {i}.", "input": "x" * (i % 2), "output": f"{language} {i}"}
        for language, name in NAMES.items()
        for i in range(7)
    ]
    rows += [
        {"instruction": "Convert this JavaScript to Python.", "input": "let a", "output": "a = 0"},
        {"instruction": "Write a PHP page.", "input": "", "output": "<?php ?>"},
        {"instruction": "Sort a list.", "input": "", "output": "python 3"},
        {"instruction": "Write a Java program, number 1.", "input": "x", "output": "another"},
        {"instruction": "Answer nothing.", "input": "", "output": " "},
    ]
    return rows


def run_prepare(monkeypatch, folder, *flags):
    """Run the script as a user does; returns the content of its files by name."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--output_dir", str(folder), *map(str, flags)])
    runpy.run_path(PREPARE, run_name="__main__")
    return {
        str(path.relative_to(folder).with_suffix("")): [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.rglob("*.jsonl")
    }


def prepare(monkeypatch, tmp_path, *flags):
    source = write(tmp_path / "instructions.jsonl", instructions())
    return run_prepare(monkeypatch, tmp_path / "out", "--instructions", source, "--min_train_examples", 3, *flags)


def check_no_text_on_two_sides(files):
    """Prompts and completions of clients, held-out set and public set are all different."""
    sides = {name: rows for name, rows in files.items() if name != "humaneval"}
    for column in ("prompt", "completion"):
        texts = [row[column] for rows in sides.values() for row in rows]
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "instruction, languages",
    [
        ("Write a Python program.", ["python"]),
        ("Is it python3 or PYTHON?", ["python"]),
        ("Write a JavaScript function.", ["javascript"]),
        ("Start a server in Node.js.", ["javascript"]),
        ("Write a Java method.", ["java"]),
        ("Write a C++ class.", ["cpp"]),
        ("Sort with C++11.", ["cpp"]),
        ("From Java to C++", ["cpp", "java"]),
        ("Write a C program.", []),
        ("Write a C# class with JSON.", []),
        ("Write a shell script.", []),
    ],
)
def test_language_that_an_instruction_names(instruction, languages):
    assert runpy.run_path(PREPARE)["named_languages"](instruction) == languages


def test_who_gets_what(monkeypatch, tmp_path):
    files = prepare(monkeypatch, tmp_path, "--eval_per_language", 2)
    assert set(files) == {*(f"clients/{name}" for name in NAMES), "eval", "public"}
    for language in NAMES:
        heldout = [row for row in files["eval"] if row["language"] == language]
        train = files[f"clients/{language}"]
        assert (len(heldout), len(train)) == (2, 5)
        assert {row["completion"] for row in heldout + train} == {f" {language} {i}" for i in range(7)}
    # 'python 3' is a client's, the PHP page is nobody's
    assert files["public"] == [{"prompt": "Instruction: Write a PHP page.\nResponse:", "completion": " <?php ?>"}]
    check_no_text_on_two_sides(files)


def test_layout_is_the_one_of_the_base(monkeypatch, tmp_path):
    rows = prepare(monkeypatch, tmp_path, "--eval_per_language", 2)["clients/cpp"]
    by_completion = {row["completion"]: row["prompt"] for row in rows}
    completion, number = next((text, int(text[-1])) for text in by_completion if int(text[-1]) % 2)
    prompt = f"Instruction: Write a C++ program, number {number}.\nInput: x\nResponse:"
    assert by_completion[completion] == prompt


def test_more_public_text_and_humaneval(monkeypatch, tmp_path):
    problems = write(tmp_path / "problems.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    humaneval = write(tmp_path / "humaneval.jsonl", [row | {"test": "assert f() == 1", "entry_point": "f"}])
    flags = ["--eval_per_language", 2, "--more_public", problems, "--humaneval", humaneval]
    files = prepare(monkeypatch, tmp_path, *flags)
    assert len(files["public"]) == 2
    assert {"prompt": "Instruction: 1 + 1?\nResponse:", "completion": " #### 2"} in files["public"]
    assert files["humaneval"] == [
        {
            "task_id": "HumanEval/0",
            "prompt": "def f():\n",
            "completion": "    return 1\n",
            "test": "assert f() == 1",
            "entry_point": "f",
        }
    ]


def test_too_few_examples_of_a_language(monkeypatch, tmp_path):
    message = "`eval_per_language` is 5, which leaves client 'cpp' 2 of its 7 examples, but `min_train_examples` is 3"
    with pytest.raises(ValueError, match=message):
        prepare(monkeypatch, tmp_path, "--eval_per_language", 5)


def test_pretraining_reads_either_form(tmp_path):
    to_texts = runpy.run_path(str(RECIPES / "gsm8k" / "pretrain.py"))["to_texts"]
    text = "Instruction: Sort.\nInput: 2 1\nResponse: 1 2"
    raw = {"instruction": ["Sort."], "input": ["2 1"], "output": ["1 2"]}
    prepared = {"prompt": ["Instruction: Sort.\nInput: 2 1\nResponse:"], "completion": [" 1 2"]}
    assert to_texts(Dataset.from_dict(raw)) == to_texts(Dataset.from_dict(prepared)) == [text]
