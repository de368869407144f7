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
from conftest import assert_as_exact, save_files, sums, tiny_model
from safetensors.torch import load_file

from fedbiot_trainer.cli import train as cli
from fedbiot_trainer.shared.processes import prepare_fsdp


pytestmark = pytest.mark.trains


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
# The same examples in each step as one process with twice the batch sizes.
TWO, ONE = (2, 3), (4, 6)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("files")
    tiny_model().double().save_pretrained(folder / "exact")
    tokenizer.save_pretrained(folder / "exact")
    return save_files(folder, tokenizer, a=sums(0, 8), b=sums(8, 12), public=sums(20, 30), test=sums(30, 33))


def launch(*command, config=None):
    """Launch a script, in two processes if there is a configuration."""
    if config == "fsdp2":
        command, config = (Path(__file__).parent / "fsdp_run.py", CONFIGS / "fsdp2.yaml", *command), "ddp"
    launcher = [sys.executable]
    if config is not None:
        launcher += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(CONFIGS / "cpu" / f"{config}.yaml")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    # DeepSpeed calls ninja, which may be nowhere but beside this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def flags_of(files, folder, batch_sizes, base="base", **settings):
    settings = {
        "num_rounds": 3, "local_steps": 3, "initial_alignment_steps": 4, "alignment_steps": 2, "lora_dropout": 0.0,
        "per_device_train_batch_size": batch_sizes[0], "alignment_batch_size": batch_sizes[1], "learning_rate": 2e-3,
        # An epsilon that keeps AdamW from blowing up the rounding of gradients near zero.
        "alignment_learning_rate": 2e-3, "adam_epsilon": 1e-3, "proximal_weight": 0.5, "report_to": "none", "use_cpu": "true", "dtype": "auto",
        "eval_metric": "exact_match", "eval_max_new_tokens": 3, "teacher_cache_dir": folder / "cache", **settings,
    }  # fmt: skip
    flags = [
        "--model_name_or_path", files / base, "--output_dir", folder / "out",
        "--client_datasets", f"north={files / 'a.jsonl'}", f"south={files / 'b.jsonl'}",
        "--public_dataset_name", files / "public.jsonl", "--eval_dataset_name", files / "test.jsonl",
    ]  # fmt: skip
    return [*map(str, flags), *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def run_two(files, folder, config, **settings):
    """The run in two processes. Gives its folder."""
    result = launch(ROOT / "recipes" / "fedbiot_sft.py", *flags_of(files, folder, TWO, **settings), config=config)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder / "out"


def run_one(files, folder, base="base", **settings):
    """The run in this process alone, of float32 weights or of float64 ones (`"exact"`). Gives its folder."""
    cli.train(*cli.make_parser().parse_args_and_config(flags_of(files, folder / base, ONE, base, **settings)))
    return folder / base / "out"


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_one(files, folder), run_one(files, folder, "exact")


LOSSES = ("loss", "_l2", "_kl")


def losses_of(folder):
    """All losses of a run, by name."""
    found = {}
    for file in folder.rglob("rounds.jsonl"):
        for number, line in enumerate(file.open()):
            record = json.loads(line)
            losses = {name: value for name, value in record.items() if name.endswith(LOSSES)}
            for of_clients in ("client_losses", "proximal_terms"):
                losses |= {(of_clients, client): value for client, value in record[of_clients].items()}
            place = str(file.relative_to(folder)), number
            found |= {(*place, name): value for name, value in losses.items() if value is not None}
    summary = json.loads((folder / "summary.json").read_text())
    return found | {who: summary[who]["loss"] for who in ("zero_shot", "adap_emu", "adap_fu")}


def loras_of(folder):
    files = {str(file.relative_to(folder)): load_file(file) for file in folder.rglob("adapter_model.safetensors")}
    return {(file, key): tensor for file, tensors in files.items() for key, tensor in tensors.items()}


def assert_same_run(two, one, exact):
    """
    A run in two processes is as near to the one in float64 as that of one process: see [`assert_as_exact`]. Losses count
    by their relative errors, so that these are as large as those of the LoRAs, whose numbers are about 0.1.
    """
    runs = [(losses_of(folder), loras_of(folder)) for folder in (two, one, exact)]
    expected_losses, expected_loras = runs[2]
    sizes = torch.tensor([abs(value) or 1.0 for value in expected_losses.values()], dtype=torch.float64)
    vectors = []
    for losses, loras in runs:
        assert losses.keys() == expected_losses.keys() and loras.keys() == expected_loras.keys()
        relative = torch.tensor([losses[name] for name in expected_losses], dtype=torch.float64) / sizes
        vectors.append(torch.cat([relative, *(loras[key].double().flatten() for key in expected_loras)]))
    assert_as_exact(*vectors)


def test_two_processes_compute_the_same_start(files, tmp_path):
    settings = {"alignment_init": "closed_form", "initial_alignment_steps": 0, "num_rounds": 1}
    one, exact = (run_one(files, tmp_path, base, **settings) for base in ("base", "exact"))
    assert_same_run(run_two(files, tmp_path, "ddp", **settings), one, exact)


@pytest.mark.parametrize("config, kind", [("ddp", "MULTI_CPU"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"),
                                          pytest.param("zero3_init", "DEEPSPEED", marks=pytest.mark.slow), ("fsdp2", "FSDP")])  # fmt: skip
def test_two_processes_give_what_one_gives(files, tmp_path, one_process, config, kind):
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    two, (one, exact) = run_two(files, tmp_path, config), one_process
    assert_same_run(two, one, exact)
    records = [json.loads(line) for line in (two / "rounds.jsonl").open()]
    assert len(records) == 3  # a second writer would make it six
    assert records[0]["proximal_terms"]["north"] > 0

    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (two, one))
    assert (summary["processes"], expected["processes"]["number"]) == ({"number": 2, "type": kind}, 1)
    assert summary["parameters"] == expected["parameters"]
    for who in ("zero_shot", "adap_emu", "adap_fu"):
        accuracies = {name: value for name, value in summary[who].items() if name != "loss"}
        assert len(accuracies) == 2 and accuracies.items() <= expected[who].items()
    assert summary["bytes"]["down"] == expected["bytes"]["down"]
    assert abs(summary["bytes"]["up"] - expected["bytes"]["up"]) < 20  # digits of the losses
    packages = [load_file(path / "emulator_package" / "model.safetensors") for path in (two, one)]
    assert packages[0].keys() == packages[1].keys()
    assert all(torch.equal(packages[0][key], tensor) for key, tensor in packages[1].items())


def test_two_processes_with_an_online_teacher(files, tmp_path, one_process):
    assert_same_run(run_two(files, tmp_path, "ddp", teacher="online"), *one_process)


@pytest.mark.parametrize("method, config", [("fedot", "ddp"), ("local_only", "ddp"), ("full_lora", "zero3")])
def test_methods_give_in_two_processes_what_they_give_in_one(files, tmp_path, method, config):
    if config != "ddp":
        pytest.importorskip("deepspeed")
    settings = {"method": method, "num_rounds": 1}
    one, exact = (run_one(files, tmp_path, base, **settings) for base in ("base", "exact"))
    assert_same_run(run_two(files, tmp_path, config, **settings), one, exact)
    expected = json.loads((one / "summary.json").read_text())
    assert expected["adap_fu"]["loss"] != expected["zero_shot"]["loss"]


def test_fsdp2_with_mixed_precision(files, tmp_path):
    """Without a proximal term, so that FSDP2 alone makes the gradients of what it first saw frozen."""
    settings = {"teacher": "online", "proximal_weight": 0}
    one, exact = run_one(files, tmp_path, bf16="true", **settings), run_one(files, tmp_path, "exact", **settings)
    assert_same_run(run_two(files, tmp_path, "fsdp2", bf16="true", **settings), one, exact)


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
    folder = run_two(files, tmp_path, "ddp", **settings)
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
