import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import sums, tiny_model
from safetensors.torch import load_file

from fedbiot_trainer.shared.processes import prepare_fsdp


pytestmark = pytest.mark.trains


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
# The same examples in each step as one process with twice the batch sizes.
TWO, ONE = (2, 3), (4, 6)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, dataset in {"a": sums(0, 8), "b": sums(8, 12), "public": sums(20, 30), "test": sums(30, 33)}.items():
        dataset.to_json(folder / f"{name}.jsonl")
    return folder


def launch(*command, config=None):
    """Launch a script, in two processes if there is a configuration."""
    if config == "fsdp2":
        command, config = (Path(__file__).parent / "fsdp_run.py", CONFIGS / "fsdp2.yaml", *command), "ddp"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if config is None:
        launcher += [
            "--num_processes",
            "1",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
    else:
        launcher += ["--config_file", str(CONFIGS / "cpu" / f"{config}.yaml"), "--main_process_port", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    # DeepSpeed calls ninja, which may be nowhere but beside this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def run_recipe(files, folder, batch_sizes, config=None, **settings):
    settings = {
        "num_rounds": 3, "local_steps": 3, "initial_alignment_steps": 4, "alignment_steps": 2, "lora_dropout": 0.0,
        "per_device_train_batch_size": batch_sizes[0], "alignment_batch_size": batch_sizes[1], "learning_rate": 2e-3,
        "alignment_learning_rate": 2e-3, "proximal_weight": 0.5, "report_to": "none", "use_cpu": "true",
        "eval_metric": "exact_match", "eval_max_new_tokens": 3, "teacher_cache_dir": folder / "cache", **settings,
    }  # fmt: skip
    result = launch(
        ROOT / "recipes" / "fedbiot_sft.py", "--model_name_or_path", files / "base", "--output_dir", folder / "out",
        "--client_datasets", f"north={files / 'a.jsonl'}", f"south={files / 'b.jsonl'}",
        "--public_dataset_name", files / "public.jsonl", "--eval_dataset_name", files / "test.jsonl",
        *(word for name, value in settings.items() for word in (f"--{name}", value)), config=config,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    return folder / "out"


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    return run_recipe(files, tmp_path_factory.mktemp("one"), ONE)


@pytest.mark.parametrize("config, kind", [("ddp", "MULTI_CPU"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"),
                                          ("zero3_init", "DEEPSPEED"), ("fsdp2", "FSDP")])  # fmt: skip
def test_two_processes_give_what_one_gives(files, tmp_path, one_process, config, kind):
    """Float32 sums of other parts, through 19 AdamW steps of 2e-3: 1e-4 in losses, 2e-4 in the LoRAs."""
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    folder = run_recipe(files, tmp_path, TWO, config)
    records, expected = (
        [json.loads(line) for line in (path / "rounds.jsonl").open()] for path in (folder, one_process)
    )
    assert len(records) == len(expected) == 3  # a second writer would make it six
    for record, one in zip(records, expected, strict=True):
        for name, value in one.items():
            if name in ("client_losses", "proximal_terms") or name.startswith(("adap_", "zero_", "alignment_")):
                assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert expected[0]["proximal_terms"]["north"] > 0

    summary, one = (json.loads((path / "summary.json").read_text()) for path in (folder, one_process))
    assert (summary["processes"], one["processes"]["number"]) == ({"number": 2, "type": kind}, 1)
    assert summary["parameters"] == one["parameters"]
    assert summary["bytes"]["down"] == one["bytes"]["down"]
    assert abs(summary["bytes"]["up"] - one["bytes"]["up"]) < 20  # digits of the losses
    for name in ("zero_shot", "adap_emu", "adap_fu"):
        assert summary[name] == pytest.approx(one[name], rel=1e-4)

    for path in ("client_lora", "emulator_package", "emulator_package/emulator_lora"):
        (file,) = (folder / path).glob("*.safetensors")
        tensors, expected = load_file(file), load_file(one_process / path / file.name)
        assert tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(tensors[key], tensor, atol=2e-4 if "lora" in path else 0), key


def test_two_processes_with_an_online_teacher(files, tmp_path, one_process):
    folder = run_recipe(files, tmp_path, TWO, "ddp", teacher="online")
    state, expected = (load_file(path / "client_lora" / "adapter_model.safetensors") for path in (folder, one_process))
    assert all(torch.allclose(state[key], expected[key], atol=2e-4) for key in expected)


@pytest.mark.parametrize("method, config", [("fedot", "ddp"), ("local_only", "ddp"), ("full_lora", "zero3")])
def test_methods_give_in_two_processes_what_they_give_in_one(files, tmp_path, method, config):
    if config != "ddp":
        pytest.importorskip("deepspeed")
    two, one = (
        run_recipe(files, tmp_path / str(number), sizes, launched, method=method, num_rounds=1)
        for number, (sizes, launched) in enumerate([(TWO, config), (ONE, None)])
    )
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (two, one))
    for name in ("zero_shot", "adap_emu", "adap_fu"):
        assert summary[name] == pytest.approx(expected[name], rel=1e-4)
    assert expected["adap_fu"]["loss"] != expected["zero_shot"]["loss"]


def test_clients_alone_are_refused_under_deepspeed(files, tmp_path):
    pytest.importorskip("deepspeed")
    with pytest.raises(AssertionError, match="`method` is 'local_only', .* DeepSpeed for one run only"):
        run_recipe(files, tmp_path, TWO, "zero2", method="local_only")


def test_fsdp2_with_mixed_precision(files, tmp_path, one_process):
    """Without a proximal term, so that FSDP2 alone makes the gradients of what it first saw frozen."""
    folder = run_recipe(files, tmp_path, TWO, "fsdp2", bf16="true", teacher="online", proximal_weight=0)
    records, expected = (
        [json.loads(line) for line in (path / "rounds.jsonl").open()] for path in (folder, one_process)
    )
    for record, one in zip(records, expected, strict=True):
        for name in ("alignment_l2", "alignment_kl", "adap_emu_loss", "adap_fu_loss", "client_losses"):
            assert record[name] == pytest.approx(one[name], rel=2e-2), name


@pytest.mark.usefixtures("pass_at_k")
def test_metrics_of_two_processes_are_those_of_one(files, tmp_path):
    """The texts of both, in the order of the data, compared by one. 5 batches: one process runs the last for nothing."""
    script = ROOT / "tests" / "evaluation" / "metric_run.py"
    results = []
    for config in (None, "ddp"):
        folder = tmp_path / str(config)
        flags = ["--folder", folder, "--model", files / "base", "--data", files / "test.jsonl"]
        result = launch(script, *flags, config=config)
        assert result.returncode == 0, result.stderr[-5000:]
        results += [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    one, *two = results
    assert two == [one, one]
    assert len(set(one["completions"])) > 3
    assert (one["order"]["length"], one["order"]["rank"], one["pass_at_k"]) == (9, 0, {"pass_at_1": 0.5})


@pytest.mark.parametrize("name, value", [("fsdp_version", 1), ("cpu_ram_efficient_loading", True)])
def test_fsdp_settings_that_cannot_work_are_refused(name, value):
    plugin = SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, name: value})
    accelerator = SimpleNamespace(distributed_type="FSDP", state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=name):
        prepare_fsdp(accelerator)


def test_failing_process_ends_the_run(files, tmp_path):
    script = Path(__file__).parent / "distributed_run.py"
    result = launch(script, "--folder", tmp_path / "out", "--model", files / "base", "--watch", "fail", config="ddp")
    assert result.returncode != 0
    assert "RuntimeError: the disk of this machine is gone" in result.stderr
    assert len((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()) >= 1  # nothing that was computed is lost


def test_processes_stop_early_together(files, tmp_path):
    script = Path(__file__).parent / "distributed_run.py"
    flags = ["--folder", tmp_path / "out", "--model", files / "base", "--watch", "patience", "--num_rounds", 6]
    result = launch(script, *flags, config="ddp")
    assert result.returncode == 0, result.stderr[-5000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rounds"], summary["best_round"]) == (3, 1)


def test_two_processes_keep_the_best_round(files, tmp_path):
    settings = {"load_best_model_at_end": "true", "metric_for_best_model": "adap_fu_loss", "learning_rate": 0.3}
    folder = run_recipe(files, tmp_path, TWO, config="ddp", **settings)
    summary = json.loads((folder / "summary.json").read_text())
    losses = [json.loads(line)["adap_fu_loss"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert losses[summary["best_round"] - 1] == min(losses) == pytest.approx(summary["adap_fu"]["loss"])
    assert summary["best_round"] < 3  # at this learning rate


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rounds(files, tmp_path):
    """26 rounds of 2 clients under ZeRO-3, compared from the second on."""
    pytest.importorskip("deepspeed")
    script = Path(__file__).parent / "distributed_run.py"
    flags = ["--folder", tmp_path / "out", "--model", files / "base", "--watch", "memory", "--num_rounds", 26]
    result = launch(script, *flags, config="zero3")
    assert result.returncode == 0, result.stderr[-5000:]
    resident = [int(value) for value in re.findall(r"^resident (\d+)", result.stdout, flags=re.MULTILINE)]
    assert len(resident) == 26
    assert resident[-1] < 1.03 * resident[1]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_accelerate_config_is_understood(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "single_gpu" else 2 if path.parent.name == "cpu" else 8)
    assert path.read_text().startswith("# ")
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config)) | {"deepspeed_config", "fsdp_config"}
