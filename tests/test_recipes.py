import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sums, tiny_model
from transformers import AutoModelForCausalLM

from fedbiot_trainer import FedBiOTConfig


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "fedbiot_sft.py"
YAMLS = sorted((ROOT / "recipes").glob("*/*.yaml"))


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
    tiny_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, dataset in {"a": sums(0, 8), "b": sums(8, 12), "public": sums(20, 30), "test": sums(30, 33)}.items():
        dataset = dataset.rename_columns({"prompt": "question", "completion": "answer"})
        dataset.to_json(folder / f"{name}.jsonl")
    return folder


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


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_yaml_is_understood(recipe, path, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    script_args, training_args, model_args = recipe.make_parser().parse_args_and_config(
        ["--config", str(path), *flags]
    )
    assert isinstance(training_args, FedBiOTConfig)
    assert model_args.lora_r > 0
    assert training_args.without_effect() == []
    assert path.read_text().startswith("# Hardware:")
    assert script_args.task or (script_args.dataset_name and script_args.public_dataset_name)


def test_llama2_yaml_holds_the_papers_setting(recipe):
    flags = ["--config", str(ROOT / "recipes/gsm8k/llama2_7b.yaml"), "--bf16", "false"]
    script_args, args, model_args = recipe.make_parser().parse_args_and_config(flags)
    assert (args.num_clients, args.partition, args.local_steps, args.num_adapter_layers) == (3, "iid", 30, 2)
    assert (args.emulator_drop_ratio, args.initial_alignment_steps, args.alignment_steps) == (0.2, 500, 10)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert (script_args.dataset_name, script_args.public_dataset_name) == ("openai/gsm8k", "tatsu-lab/alpaca")
    assert model_args.model_name_or_path == "meta-llama/Llama-2-7b-hf"


def test_demo_stands_in_where_nothing_is_named(recipe):
    assert recipe.with_default_config([])[1].endswith("demo.yaml")
    assert recipe.with_default_config(["--seed", "1"])[-2:] == ["--seed", "1"]
    for named in (["--config", "x.yaml"], ["--model_name_or_path", "m"], ["--help"]):
        assert recipe.with_default_config(named) == named


def test_help(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe.make_parser().parse_args_and_config(["--help"])
    text = capsys.readouterr().out
    assert "--emulator_drop_ratio" in text
    assert "--public_dataset_name" in text


def test_demo_from_end_to_end(tmp_path):
    """The embedded demo, with few steps: no network, no files of the user's."""
    flags = "--num_rounds 1 --local_steps 2 --initial_alignment_steps 2 --alignment_steps 1 --eval_max_new_tokens 2"
    result = launch("--output_dir", tmp_path / "demo", *flags.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for text in ("FedBiOT split", "round 1/1", "zero-shot full model", "AdapFu (full model)", "exact match"):
        assert text in result.stdout
    assert "Warning" not in result.stdout + result.stderr, result.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["zero_shot"]["exact_match"] < 0.05
    assert summary["parameters"]["client_share"] < 0.7


def test_data_from_files(files, tmp_path):
    result = launch(
        "--model_name_or_path", files / "base", "--dataset_name", files / "a.jsonl",
        "--eval_dataset_name", files / "test.jsonl", "--public_dataset_name", files / "public.jsonl",
        "--output_dir", tmp_path / "out", "--num_clients", 2, *TEMPLATES, *SMALL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_examples"] == {"client-0": 12, "client-1": 12}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "emulator_package")


def test_one_file_for_each_client(files, tmp_path):
    result = launch(
        "--model_name_or_path", files / "base", "--client_datasets", f"north={files / 'a.jsonl'}",
        f"south={files / 'b.jsonl'}", "--public_dataset_name", files / "public.jsonl",
        "--output_dir", tmp_path / "out", *TEMPLATES, *SMALL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_examples"] == {"north": 24, "south": 12}
    assert "adap_fu" not in summary


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--emulator_drop_ratio", "1.5"], "`emulator_drop_ratio` is 1.5"),
        (["--model_name_or_path", "m"], "Set one of `dataset_name` and `client_datasets`, or `task`"),
        (["--dataset_streaming", "true"], "`dataset_streaming` is True, but a federated run"),
        (["--model_name_or_path", "m", "--dataset_name", "gone.jsonl"], "There is no file 'gone.jsonl'"),
        (["--model_name_or_path", "m", "--client_datasets", "a.jsonl"], "`client_datasets` must be NAME=DATASET each"),
        (
            ["--model_name_or_path", "m", "--dataset_name", "x.jsonl", "--prompt_template", "{question}"],
            "`prompt_template` and `completion_template` belong together",
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
        recipe.main(*recipe.make_parser().parse_args_and_config(recipe.with_default_config(flags)))
