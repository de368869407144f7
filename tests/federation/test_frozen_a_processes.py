"""A fixed A where several processes share the work, or the parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_files, sums
from safetensors.torch import load_file


TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SETTINGS = {
    "num_rounds": 2, "local_steps": 3, "initial_alignment_steps": 2, "alignment_steps": 1, "lora_dropout": 0.0,
    "learning_rate": 2e-3, "proximal_weight": 0.5, "report_to": "none", "use_cpu": "true", "freeze_a": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("files")
    return save_files(folder, tokenizer, a=sums(0, 8), b=sums(8, 12), public=sums(20, 30))


def run(files, folder, batch_sizes, config=None):
    script = [ROOT / "recipes" / "fedbiot_sft.py"]
    if config == "fsdp2":
        runner = next(TESTS.rglob("fsdp_run.py"))
        script, config = [runner, ROOT / "accelerate_configs" / "fsdp2.yaml", *script], "ddp"
    command = [sys.executable]
    if config is not None:
        file = ROOT / "accelerate_configs" / "cpu" / f"{config}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"]
    settings = SETTINGS | {"per_device_train_batch_size": batch_sizes[0], "alignment_batch_size": batch_sizes[1]}
    settings |= {"teacher_cache_dir": folder / "cache", "output_dir": folder / "out"}
    command += [
        *script, "--model_name_or_path", files / "base", "--public_dataset_name", files / "public.jsonl",
        "--client_datasets", f"north={files / 'a.jsonl'}", f"south={files / 'b.jsonl'}",
        *(word for name, value in settings.items() for word in (f"--{name}", value)),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # DeepSpeed calls ninja, which may be nowhere but beside this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return folder / "out"


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    return run(files, tmp_path_factory.mktemp("one"), (4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_give_what_one_gives(files, tmp_path, one_process, config):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = run(files, tmp_path, (2, 3), config)
    states = [load_file(path / "client_lora" / "adapter_model.safetensors") for path in (folder, one_process)]
    for key, expected in states[1].items():
        tensor = states[0][key]
        assert torch.equal(tensor, expected) if "lora_A" in key else torch.allclose(tensor, expected, atol=2e-4), key
        assert expected.abs().max() > 0
    sizes = [json.loads((path / "summary.json").read_text())["bytes"]["down"] for path in (folder, one_process)]
    assert sizes[0] == sizes[1]
