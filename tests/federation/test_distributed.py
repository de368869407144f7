"""Runs in two processes, of which each must give what one process gives."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import assert_as_exact, slow
from launches import CONFIGS, TWO, flags_of, launch, run_one, run_two, save_run_files
from safetensors.torch import load_file

from fedbiot_trainer.shared.processes import prepare_fsdp


pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    return save_run_files(tmp_path_factory.mktemp("files"), tokenizer)


ROUNDS = {"num_rounds": 2}


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_one(files, folder, **ROUNDS), run_one(files, folder, "exact", **ROUNDS)


LOSSES = ("loss", "_l2", "_kl")


def losses_of(folder):
    """All losses of a run, by name."""
    found = {}
    for file in folder.rglob("rounds.jsonl"):
        for number, line in enumerate(file.open()):
            record = json.loads(line)
            losses = {name: value for name, value in record.items() if name.endswith(LOSSES)}
            for of_clients in ("client_losses", "proximal_terms", "client_zero_shot_losses"):
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


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero3", "zero3_init", "fsdp2"])
def test_two_processes_compute_the_same_start(files, tmp_path, config):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    settings = {"alignment_init": "closed_form", "initial_alignment_steps": 0, "num_rounds": 1}
    one, exact = (run_one(files, tmp_path, base, **settings) for base in ("base", "exact"))
    assert_same_run(run_two(files, tmp_path, config, **settings), one, exact)


@pytest.mark.parametrize(
    "config, kind",
    [
        ("ddp", "MULTI_CPU"),
        slow("zero2", "DEEPSPEED"),
        ("zero3", "DEEPSPEED"),
        slow("zero3_init", "DEEPSPEED"),
        slow("fsdp2", "FSDP"),
    ],
)
def test_two_processes_give_what_one_gives(files, tmp_path, one_process, config, kind):
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    two, (one, exact) = run_two(files, tmp_path, config, **ROUNDS), one_process
    assert_same_run(two, one, exact)
    records = [json.loads(line) for line in (two / "rounds.jsonl").open()]
    assert len(records) == 2  # a second writer would make it four
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


@pytest.mark.slow
def test_two_processes_with_an_online_teacher(files, tmp_path, one_process):
    assert_same_run(run_two(files, tmp_path, "ddp", teacher="online", **ROUNDS), *one_process)


@pytest.mark.slow
@pytest.mark.parametrize("method, config", [("fedot", "ddp"), ("local_only", "ddp"), ("full_lora", "zero3")])
def test_methods_give_in_two_processes_what_they_give_in_one(files, tmp_path, method, config):
    if config != "ddp":
        pytest.importorskip("deepspeed")
    settings = {"method": method, "num_rounds": 1}
    one, exact = (run_one(files, tmp_path, base, **settings) for base in ("base", "exact"))
    assert_same_run(run_two(files, tmp_path, config, **settings), one, exact)
    expected = json.loads((one / "summary.json").read_text())
    assert expected["adap_fu"]["loss"] != expected["zero_shot"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3", "fsdp2"])
def test_fixed_a_where_processes_share_the_work_or_the_parameters(files, tmp_path, config):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    settings = {"freeze_a": "true", "num_rounds": 2}
    one, exact = (run_one(files, tmp_path, base, **settings) for base in ("base", "exact"))
    two = run_two(files, tmp_path, config, **settings)
    assert_same_run(two, one, exact)
    states = [load_file(folder / "client_lora" / "adapter_model.safetensors") for folder in (two, one)]
    for key, expected in states[1].items():
        assert expected.abs().max() > 0
        assert "lora_A" not in key or torch.equal(states[0][key], expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_two_processes_learn_the_same_plug_in(files, tmp_path, config):
    if config == "zero2":
        pytest.importorskip("deepspeed")
    settings = {"plug_in_steps": 4, "num_rounds": 1}
    one, exact = (run_one(files, tmp_path, base, **settings) for base in ("base", "exact"))
    two = run_two(files, tmp_path, config, **settings)
    assert_same_run(two, one, exact)
    for folder in (two, one, exact):
        learning = json.loads((folder / "summary.json").read_text())["plug_in_learning"]
        assert learning["steps"] == 4 and learning["kept"] and learning["after"] < learning["before"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_shards_cannot_learn_a_plug_in(files, tmp_path, config):
    if config == "zero3":
        pytest.importorskip("deepspeed")
    flags = flags_of(files, tmp_path, TWO, plug_in_steps=4, num_rounds=1)
    result = launch(CONFIGS.parent / "recipes" / "fedbiot_sft.py", *flags, config=config)
    assert result.returncode != 0
    assert "`plug_in_steps` is 4, but DeepSpeed ZeRO-3 and FSDP2 shard" in result.stderr


@pytest.mark.slow
def test_fsdp2_with_mixed_precision(files, tmp_path):
    """Without a proximal term, so that FSDP2 alone makes the gradients of what it first saw frozen."""
    settings = {"teacher": "online", "proximal_weight": 0}
    one, exact = run_one(files, tmp_path, bf16="true", **settings), run_one(files, tmp_path, "exact", **settings)
    assert_same_run(run_two(files, tmp_path, "fsdp2", bf16="true", **settings), one, exact)


@pytest.mark.parametrize("name, value", [("fsdp_version", 1), ("cpu_ram_efficient_loading", True)])
def test_fsdp_settings_that_cannot_work_are_refused(name, value):
    plugin = SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, name: value})
    accelerator = SimpleNamespace(distributed_type="FSDP", state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=name):
        prepare_fsdp(accelerator)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_accelerate_config_is_understood(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "single_gpu" else 2 if path.parent.name == "cpu" else 8)
    assert path.read_text().startswith("# ")
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config)) | {"deepspeed_config", "fsdp_config"}
