import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, save_files, slow, sums, tiny_model
from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import AutoModelForCausalLM

from fedbiot_trainer import METHODS, FedBiOTConfig
from fedbiot_trainer.cli import train as cli
from fedbiot_trainer.cli.plan import plan_tables
from fedbiot_trainer.data import sources


pytestmark = pytest.mark.trains


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "fedbiot_sft.py"
YAMLS = sorted(path for path in (ROOT / "recipes").glob("**/*.yaml") if path.parent.name != "lm_eval")
YAML_NAMES = [f"{path.parent.name}/{path.stem}" for path in YAMLS]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("fedbiot_sft", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fedbiot_sft"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path, tokenizer):
    """A base model and data on disk, under a folder whose name has a dot."""
    folder = tmp_path / "data.d"
    datasets = {"a": sums(0, 8), "b": sums(8, 12), "public": sums(20, 30), "test": sums(30, 33)}
    columns = {"prompt": "question", "completion": "answer"}
    renamed = {name: dataset.rename_columns(columns) for name, dataset in datasets.items()}
    return save_files(folder, tokenizer, **renamed)


def run(*arguments):
    """The recipe, in this process."""
    cli.train(*cli.make_parser().parse_args_and_config(list(map(str, arguments))))


def launch(*arguments, cwd=ROOT):
    """The recipe as a user starts it, without network."""
    command = [
        "accelerate", "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", str(RECIPE), *map(str, arguments),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


SMALL = [
    "--num_rounds", 2, "--local_steps", 3, "--initial_alignment_steps", 3, "--alignment_steps", 2,
    "--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu", "true", "--num_adapter_layers", 2,
]  # fmt: skip
TEMPLATES = [
    "--prompt_template", "{question}", "--completion_template", "{answer}",
    "--public_prompt_template", "{question}", "--public_completion_template", "{answer}",
]  # fmt: skip


@pytest.mark.parametrize("path", YAMLS, ids=YAML_NAMES)
def test_yaml_is_understood(path, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    script_args, training_args, model_args = cli.make_parser().parse_args_and_config(["--config", str(path), *flags])
    assert isinstance(training_args, FedBiOTConfig)
    assert model_args.lora_r > 0
    assert training_args.without_effect() == {}
    assert path.read_text().startswith("# Hardware:")
    assert script_args.task or script_args.public_dataset_name


LANGUAGES = ["C", "C#", "C++", "Go", "Java", "PHP", "Pascal", "Python", "Scala"]
CATEGORIES = [
    "brainstorming", "classification", "closed_qa", "creative_writing", "general_qa", "information_extraction",
    "open_qa", "summarization",
]  # fmt: skip
THREE = ["client-0", "client-1", "client-2"]
CLIENTS = {"code": LANGUAGES, "dolly": CATEGORIES, "gsm8k": THREE, "smollm2": THREE}
ROSETTA = (
    "https://raw.githubusercontent.com/sahil280114/codealpaca/d269da106a579a623a654529b3cb91b5dfa9c72f/data/"
    "rosetta_alpaca.json"
)


def texts(**columns):
    """12 rows."""
    return Dataset.from_list([{name: f"{text} {i}" for name, text in columns.items()} for i in range(12)])


def texts_by(column, values, **columns):
    """12 rows for each of `values` in `column`."""
    return concatenate_datasets([texts(**columns).add_column(column, [value] * 12) for value in values])


# In place of the Hub: the columns and splits that the sets have there, by (name, configuration, split).
HUB = {
    ("openai/gsm8k", "main", "train"): texts(question="q", answer="a"),
    ("openai/gsm8k", "main", "test"): texts(question="q", answer="a"),
    ("tatsu-lab/alpaca", None, "train"): texts(instruction="i", input="", output="o", text="t"),
    ("sahil2801/CodeAlpaca-20k", None, "train"): texts(instruction="i", input="", output="o"),
    ("databricks/databricks-dolly-15k", None, "train"): texts_by(
        "category", CATEGORIES, instruction="i", context="", response="r"
    ),
    (ROSETTA, None, "train"): texts_by("input", [*LANGUAGES, "X86-64 Assembly"], instruction="i", output="o"),
}


def load_stub(path, name=None, *, split, data_files=None):
    if data_files is not None and Path(data_files).is_file():
        return load_dataset(path, data_files=data_files, split=split)
    return HUB[data_files or path, name, split]


@pytest.mark.parametrize(
    "path", [path for path in YAMLS if path.parent.name != "demo"], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_yaml_runs(path, tmp_path, tokenizer, monkeypatch):
    """
    Every shipped YAML, all but its sizes: data, partition, trainers and a round of one step. The demo's is in
    [`test_demo_from_end_to_end`].
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "load_dataset", load_stub)
    flags = ["--config", path, "--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32"]
    for name in ("num_rounds", "local_steps", "initial_alignment_steps", "alignment_steps"):
        flags += [f"--{name}", 1]
    flags += ["--teacher_cache_dir", "cache", "--report_to", "none", "--eval_max_new_tokens", 2]
    architecture = "qwen3" if "qwen3" in path.stem else "llama"
    tiny_model(architecture, **ARCHITECTURES[architecture]).save_pretrained("base")
    tokenizer.save_pretrained("base")
    flags += ["--model_name_or_path", "base"]
    script_args, training_args, model_args = cli.make_parser().parse_args_and_config(list(map(str, flags)))
    pairs = [item.partition("=")[::2] for item in script_args.client_datasets or []]
    clients = [name for name, _ in pairs] or CLIENTS.get(path.parent.name)
    files = [script_args.dataset_name, script_args.eval_dataset_name, script_args.public_dataset_name]
    for file in filter(None, [*files, *(file for _, file in pairs)]):
        if file.startswith("outputs/"):  # what a prepare.py makes
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            sums(0, 4).to_json(file)
    if "/" in (training_args.eval_metric or ""):
        training_args.eval_metric = str(ROOT / training_args.eval_metric)
    cli.train(script_args, training_args, model_args)

    summary = json.loads(Path("out/summary.json").read_text())
    assert sorted(summary["num_examples"]) == sorted(clients)
    assert summary["rounds"] == 1
    assert {"zero_shot", "adap_emu", "adap_fu"} <= set(summary)
    if script_args.eval_fraction is not None:
        # 1 of the 12 examples of each value
        assert set(summary["num_examples"].values()) == {11}


def test_llama2_yaml_holds_the_papers_setting():
    flags = ["--config", str(ROOT / "recipes/gsm8k/llama2_7b.yaml"), "--bf16", "false"]
    script_args, args, model_args = cli.make_parser().parse_args_and_config(flags)
    assert (args.num_clients, args.partition, args.local_steps, args.num_adapter_layers) == (3, "iid", 30, 2)
    assert (args.emulator_drop_ratio, args.initial_alignment_steps, args.alignment_steps) == (0.2, 500, 10)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert (script_args.dataset_name, script_args.public_dataset_name) == ("openai/gsm8k", "tatsu-lab/alpaca")
    assert model_args.model_name_or_path == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize("folder", ["code", "dolly", "gsm8k"])
def test_both_models_have_the_same_setting(folder, tmp_path):
    """What differs between a task's two YAMLs for GPUs is the model and what its size asks for."""
    flags = ["--bf16", "false", "--output_dir", str(tmp_path), "--teacher_cache_max_gb", "1"]
    flags += ["--per_device_eval_batch_size", "1"]
    llama, qwen = (
        cli.make_parser().parse_args_and_config(["--config", str(ROOT / "recipes" / folder / file), *flags])
        for file in ("llama2_7b.yaml", "qwen3_1_7b.yaml")
    )
    assert llama[0] == qwen[0]
    assert llama[1].to_dict() == qwen[1].to_dict()
    assert qwen[2].model_name_or_path == "Qwen/Qwen3-1.7B"
    qwen[2].model_name_or_path = llama[2].model_name_or_path
    assert llama[2] == qwen[2]


def test_demo_stands_in_where_nothing_is_named(recipe):
    assert recipe.with_default_config([])[1].endswith("demo.yaml")
    assert recipe.with_default_config(["--seed", "1"])[-2:] == ["--seed", "1"]
    for named in (["--config", "x.yaml"], ["--config=x.yaml"], ["--model_name_or_path", "m"], ["--help"]):
        assert recipe.with_default_config(named) == named


def test_demo_from_end_to_end(tmp_path):
    """The embedded demo, with few steps: no network, no files of the user's."""
    flags = "--num_rounds 1 --local_steps 2 --initial_alignment_steps 2 --alignment_steps 1 --eval_max_new_tokens 2"
    flags += " --eval_rounds 0"  # only after the last
    result = launch("--output_dir", tmp_path / "demo", *flags.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for text in ("FedBiOT split", "round 1/1", "zero-shot full model", "AdapFu (full model)", "exact match"):
        assert text in result.stdout
    assert "Warning" not in result.stdout + result.stderr, result.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert sorted(summary["num_examples"]) == ["clinic", "library", "shop"]
    assert summary["zero_shot"]["exact_match"] < 0.05
    assert summary["parameters"]["client_share"] < 0.7


def test_data_from_files(files, tmp_path):
    run(
        "--model_name_or_path", files / "base", "--dataset_name", files / "a.jsonl",
        "--eval_dataset_name", files / "test.jsonl", "--public_dataset_name", files / "public.jsonl",
        "--output_dir", tmp_path / "out", "--num_clients", 2, *TEMPLATES, *SMALL,
    )  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_examples"] == {"client-0": 12, "client-1": 12}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "emulator_package")


def test_one_file_for_each_client(files, tmp_path):
    run(
        "--model_name_or_path", files / "base", "--client_datasets", f"north={files / 'a.jsonl'}",
        f"south={files / 'b.jsonl'}", "--public_dataset_name", files / "public.jsonl",
        "--output_dir", tmp_path / "out", *TEMPLATES, *SMALL,
    )  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_examples"] == {"north": 24, "south": 12}
    assert summary["adap_fu"] is None


@pytest.mark.parametrize(
    "method",
    [
        name if name in ("fedbiot", "offsite_tuning", "full_lora") else slow(name)
        for name in METHODS
        if name not in ("zero_shot", "local_only")
    ],
)
def test_plan_of_a_recipe(files, tmp_path, monkeypatch, method):
    """It counts what `plan` does for the data and the method at hand, and nothing is written."""
    flags = [
        "--model_name_or_path", files / "base", "--client_datasets", f"north={files / 'a.jsonl'}",
        f"south={files / 'b.jsonl'}", "--public_dataset_name", files / "public.jsonl", "--method", method,
        "--output_dir", tmp_path / "out", "--max_length", 16, *TEMPLATES, *SMALL,
    ]  # fmt: skip
    planned = []
    monkeypatch.setattr(cli, "plan_tables", lambda costs: planned.append(costs) or plan_tables(costs))
    run(*flags, "--plan_only", "true")
    assert not (tmp_path / "out").exists()
    settings = planned[0]["settings"]
    pooled, federated = method == "offsite_tuning", METHODS[method].clients == "federated"
    assert (settings["num_clients"], settings["local_steps"]) == (2 if federated else 1, 6 if pooled else 3)
    assert settings["public_examples"] == 30
    assert settings["num_adapter_layers_bottom"] == METHODS[method].both_ends
    if method == "fedbiot":
        run(*flags)
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert planned[0]["parameters"] == summary["parameters"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "local_only"], "`plan_only` is True, but `method` is 'local_only'"),
        (["--method", "zero_shot"], "`plan_only` is True, but `method` is 'zero_shot'"),
        ([], "`public_dataset` is None, but the emulator is aligned on public text"),
        (["--method", "full_lora", "--load_in_8bit", "true"], "`quantization_config` is set .`load_in_4bit` and"),
    ],
    ids=["alone", "nothing trains", "no public text", "quantized"],
)
def test_what_cannot_be_planned(files, tmp_path, flags, message):
    flags = [
        "--model_name_or_path", files / "base", "--client_datasets", f"north={files / 'a.jsonl'}", "--output_dir",
        tmp_path / "out", "--plan_only", "true", "--prompt_template", "{question}", "--completion_template", "{answer}",
        *SMALL, *flags,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        run(*flags)


def test_held_out_share_of_one_file(tmp_path):
    """By column: some values are kept, and of each its share is held out; the same for the same seed."""
    rows = [
        {"prompt": f"{v} {i}", "completion": f" {i}", "kind": v}
        for v, n in {"a": 20, "b": 40, "c": 5}.items()
        for i in range(n)
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))

    def load(seed, *more):
        flags = ["--model_name_or_path", "m", "--dataset_name", tmp_path / "list.json", "--use_cpu", "true", *more]
        flags += ["--output_dir", tmp_path, "--eval_fraction", 0.1, "--seed", seed]
        return cli.load_datasets(*cli.make_parser().parse_args_and_config(list(map(str, flags)))[:2])

    by_column = ["--partition", "by-column", "--partition_column", "kind", "--partition_values", "b", "a"]
    loaded = load(0, *by_column)
    train, heldout = loaded["train_dataset"], loaded["eval_dataset"]
    assert Counter(train["kind"]) == {"a": 18, "b": 36}
    assert Counter(heldout["kind"]) == {"a": 2, "b": 4}
    assert not set(train["prompt"]) & set(heldout["prompt"])
    assert load(0, *by_column)["eval_dataset"].to_list() == heldout.to_list()
    assert load(1, *by_column)["eval_dataset"].to_list() != heldout.to_list()

    loaded = load(0)
    assert (len(loaded["train_dataset"]), len(loaded["eval_dataset"])) == (59, 6)


def test_address_of_a_file(monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or sums(0, 2))
    sources.read_dataset("https://example.org/x.jsonl", None, "test")
    sources.read_dataset("owner/name", "main", "test")
    assert calls == [
        (("json",), {"data_files": "https://example.org/x.jsonl", "split": "train"}),
        (("owner/name", "main"), {"split": "test"}),
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--partition_values", "1", "7"],
            "`partition_values` has 7, but no example has that in `kind`. There is: 1, 2.",
        ),
        (
            ["--partition_column", "color", "--eval_fraction", "0.5"],
            "`partition_column` is 'color', but `dataset_name` has",
        ),
        (["--eval_fraction", "0.1"], "`eval_fraction` is 0.1, which holds out 0 of the 2 examples of '2'"),
        (["--eval_fraction", "0.9"], "`eval_fraction` is 0.9, which holds out 2 of the 2 examples of '2'"),
        (["--partition", "iid", "--partition_values", "1"], "`partition_values` is .*, but `partition` is 'iid'"),
    ],
)
def test_data_that_cannot_be_split_so(tmp_path, flags, message):
    rows = {"prompt": list("abcdefgh"), "completion": list("abcdefgh"), "kind": [1] * 6 + [2] * 2}
    Dataset.from_dict(rows).to_json(tmp_path / "data.jsonl")
    argv = ["--model_name_or_path", "m", "--dataset_name", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path)]
    argv += ["--use_cpu", "true", "--partition", "by-column", "--partition_column", "kind", *flags]
    with pytest.raises(ValueError, match=message):
        cli.train(*cli.make_parser().parse_args_and_config(argv))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--emulator_drop_ratio", "1.5"], "`emulator_drop_ratio` is 1.5"),
        (["--model_name_or_path", "m"], "Set one of `dataset_name` and `client_datasets`, or `task`"),
        (
            ["--client_datasets", "a=a.jsonl"],
            r"`client_datasets` is \['a=a.jsonl'\], but `task` is 'demo', which brings its",
        ),
        (["--max_eval_samples", "5"], "`max_eval_samples` is 5, but `task` is 'demo'"),
        (["--dataset_streaming", "true"], "`dataset_streaming` is True, but a federated run"),
        (["--model_name_or_path", "m", "--dataset_name", "gone.jsonl"], "There is no file 'gone.jsonl'"),
        (["--model_name_or_path", "m", "--client_datasets", "a.jsonl"], "`client_datasets` must be NAME=DATASET each"),
        (
            ["--model_name_or_path", "m", "--dataset_name", "x.jsonl", "--prompt_template", "{question}"],
            "`prompt_template` and `completion_template` belong together",
        ),
        (["--eval_fraction", "0.1"], "`eval_fraction` is 0.1, but it is about `dataset_name`, which is not set"),
        (["--partition_values", "a"], "`partition_values` is .*, but it is about `dataset_name`, which is not set"),
        (
            ["--model_name_or_path", "m", "--dataset_name", "x.jsonl", "--eval_fraction", "5"],
            "`eval_fraction` is 5.0, but it is the share of examples",
        ),
        (
            ["--model_name_or_path", "m", "--dataset_name", "x", "--eval_fraction", "0.1", "--eval_dataset_name", "y"],
            "`eval_fraction` is 0.1, but `eval_dataset_name` is 'y'",
        ),
        (
            ["--dataset_name", "x.jsonl", "--model_name_or_path", "m", "--partition", "by-column"],
            "`partition_column` is not set",
        ),
    ],
)
def test_wrong_arguments(recipe, tmp_path, arguments, message):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", *arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cli.train(*cli.make_parser().parse_args_and_config(recipe.with_default_config(flags)))


def test_table_of_runs_that_were_not_evaluated_in_each_round(tmp_path):
    scores = {
        "adap_emu_loss": 2.0,
        "adap_fu_loss": 1.0,
        "adap_emu_token_accuracy": 0.25,
        "adap_fu_token_accuracy": 0.5,
    }
    rounds = [{"server_round": 1, **dict.fromkeys(scores)}, {"server_round": 2, **scores}]
    summary = {"settings": {"emulator_drop_ratio": 0.5}, "zero_shot": {"loss": 3.0, "token_accuracy": 0.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "rounds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in rounds))
    command = [sys.executable, ROOT / "recipes" / "gsm8k" / "table.py", tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed[-2:] == ["| zero-shot |  | 3.000 (0.0%) |", "| 2 | 2.000 (25.0%) | 1.000 (50.0%) |"]
