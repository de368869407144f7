import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import tiny_model


FOLDER = Path(__file__).parents[2] / "recipes" / "smollm2"
SHORT = ["--labels", "Question:", "Answer:", "--max_new_tokens", 9, 6, "--start", "", "--batch_size", 4]


@pytest.fixture(scope="module")
def generate():
    return runpy.run_path(str(FOLDER / "generate.py"))


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """The near text of one task: of eight examples four are general."""
    rows = [{"prompt": f"{'Question' if i % 2 else 'Instruction'}: {i}", "completion": f" {i}"} for i in range(8)]
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp" / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def run(generate, monkeypatch, model_folder, data):
    """Run the script as a user does; returns what it wrote."""

    def run(*flags, task="svamp"):
        flags = ["--model", model_folder, "--data_dir", data, "--tasks", task, "--num_texts", 3, *flags]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
        generate["main"]()
        return [json.loads(line) for line in (data / task / "generated.jsonl").read_text().splitlines()]

    return run


def test_generated_text(run, capsys):
    rows = run(*SHORT)
    assert [row["prompt"] for row in rows[::2]] == ["Instruction: 0", "Instruction: 2", "Instruction: 4"]
    for row in rows[1::2]:
        assert row["prompt"].startswith("Question:") and row["prompt"].endswith("\nAnswer:")
        assert row["prompt"].count("\n") == 1 and len(row["prompt"]) > len("Question:\nAnswer:")
        assert row["completion"].strip() and len(row["completion"]) <= 6 * 2
    assert len({row["prompt"] for row in rows[1::2]}) == 3
    assert "svamp/generated.jsonl: 6 examples, half of them generated" in capsys.readouterr().out


def test_generated_text_is_that_of_the_seed(run):
    first, second, other = run(*SHORT, "--seed", 1), run(*SHORT, "--seed", 1), run(*SHORT, "--seed", 2)
    assert first == second != other and first[::2] == other[::2]


def test_form_of_each_task(generate):
    """A form ends with the label of what is answered, as in the task's own files."""
    assert generate["FORMS"].keys() == generate["prepare"]["TASKS"].keys()
    for task, form in generate["FORMS"].items():
        assert list(form)[-1] == ("Response:" if task == "code" else "Answer:") and min(form.values()) > 0
        assert sum(form.values()) <= 220


class Writer:
    """In the place of the model: what it writes after each label."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.texts = []

    def __call__(self, model, tokenizer, texts, max_new_tokens):
        self.texts.append((texts, max_new_tokens))
        return self.answers.pop(0)


@pytest.fixture
def write(generate, monkeypatch):
    def write(form, *answers):
        writer = Writer(*answers)
        monkeypatch.setitem(generate["write_batch"].__globals__, "continue_texts", writer)
        return generate["write_batch"](None, None, form, "<start>", len(answers[0])), writer.texts

    return write


def test_a_form_is_written_label_by_label(write):
    form = {"The": 9, "Question:": 5, "Answer:": 3}
    examples, texts = write(
        form, [" sea is wide. It", "y went.\nOn"], ["\n Who", " Where?"], [" me", " 2.\nQuestion: b"]
    )
    assert examples == [
        {"prompt": "The sea is wide.\nQuestion: Who\nAnswer:", "completion": " me"},
        {"prompt": "They went.\nQuestion: Where?\nAnswer:", "completion": " 2."},
    ]
    assert texts == [
        (["<start>The"] * 2, 9),
        (["<start>The sea is wide.\nQuestion:", "<start>They went.\nQuestion:"], 5),
        ([f"<start>{example['prompt']}" for example in examples], 3),
    ]


def test_texts_without_a_part_are_dropped(write):
    form = {"Question:": 9, "Answer:": 3}
    examples, _ = write(form, [" a", " \n", " c"], ["\n", " 3"])
    assert examples == [{"prompt": "Question: c\nAnswer:", "completion": " 3"}]
    assert write(form, ["", " "]) == ([], [(["<start>Question:"] * 2, 9)])


@pytest.mark.parametrize(
    "text, tidied",
    [
        (" One. Two! Thr", " One. Two!"),
        (" 3.5 is wha", " 3.5 is wha"),
        ("\n\nOne.  ", " One."),
        (" One. Two\n\nThree.", " One. Two"),
        (" One\nTwo\nQuestion: x", " One\nTwo"),
        ("y", "y"),
        (" \n", ""),
    ],
)
def test_tidy(generate, text, tidied):
    assert generate["tidy"](text, "\n\n|\n(?=Question:)") == tidied


def test_a_model_that_writes_nothing(run, generate, monkeypatch):
    monkeypatch.setitem(
        generate["write_batch"].__globals__, "continue_texts", lambda model, tokenizer, t, n: [""] * len(t)
    )
    with pytest.raises(
        SystemExit, match="of 32 texts for svamp the model left a part empty in 32. Give it other `--lab"
    ):
        run(*SHORT)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_texts", 0], "`--num_texts` and `--batch_size` must be at least 1"),
        (["--labels", "a", "b"], "`--labels` are ['a', 'b'] and `--max_new_tokens` []: give two or more labels"),
        (["--labels", "a", "--max_new_tokens", 3], "give two or more labels that differ and a limit for each"),
        (["--labels", "a", "a", "--max_new_tokens", 3, 3], "give two or more labels that differ"),
        (["--labels", "a", "b", "--max_new_tokens", 3, 0], "`--max_new_tokens` are [3, 0], but each must be at lea"),
    ],
)
def test_flags_that_cannot_be(run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(*flags)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "flags, task, message",
    [
        (
            [],
            "xquad",
            "`--data_dir` has no xquad/near.jsonl, .* Run `python recipes/smollm2/prepare.py --tasks xquad` fir",
        ),
        (["--num_texts", 5], "svamp", "`--num_texts` is 5, but .*near.jsonl has 4 general texts. Ask for no more"),
        (["--model", "no/where"], "svamp", "`--model` is 'no/where', which cannot be loaded: "),
    ],
)
def test_what_is_missing(run, data, flags, task, message):
    with pytest.raises(SystemExit, match=f"generate.py: error: {message}"):
        run(*flags, task=task)
    assert not list(data.rglob("generated.jsonl"))
