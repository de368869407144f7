"""Emulator packages that were handed over, and not all of them came."""

import json
import shutil
import stat

import pytest
from conftest import sums
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedbiot_trainer import ClientSFTTrainer, EmulatorPackage
from fedbiot_trainer.cli.merge import merge


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_a_tensor(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, file, metadata)


DAMAGES = {
    "no emulator LoRA": (
        lambda p: shutil.rmtree(p / "emulator_lora"),
        "has no emulator_lora/ any more. Copy it again",
    ),
    "no client LoRA": (lambda p: shutil.rmtree(p / "client_lora"), "client_lora"),
    "a tensor less": (
        lambda p: without_a_tensor(p / "model.safetensors"),
        "lacks weights: model.layers.1.input_layernorm.weight. Copy the folder again",
    ),
    "half the weights": (lambda p: cut(p / "model.safetensors"), "The weights in '.*' cannot be read"),
    "half a LoRA": (
        lambda p: cut(p / "client_lora" / "adapter_model.safetensors"),
        "The LoRA in '.*client_lora' cannot be read",
    ),
    "half a config": (
        lambda p: cut(p / "emulator_lora" / "adapter_config.json"),
        "The LoRA in '.*emulator_lora' cannot be read",
    ),
    "no manifest": (
        lambda p: (p / "fedbiot.json").write_text(""),
        "fedbiot.json' is damaged .* Copy the package again",
    ),
    "another manifest": (
        lambda p: (p / "fedbiot.json").write_text("{}"),
        "fedbiot.json' is damaged .'schema_version'",
    ),
}


@pytest.mark.trains
@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_what_is_missing_is_named(package, make_args, tmp_path, damage, message):
    folder = tmp_path / "package"
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        EmulatorPackage.load(package)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ClientSFTTrainer(package, make_args(), sums(0, 4))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.trains
def test_a_package_says_what_belongs_to_it(package, make_alignment, tmp_path):
    assert json.loads((tmp_path / "package" / "fedbiot.json").read_text())["emulator_lora"] is True
    loaded = EmulatorPackage.load(package)
    loaded.emulator_config = None  # as where all layers are adapter layers
    loaded.save(tmp_path / "all")
    assert EmulatorPackage.load(tmp_path / "all").emulator_config is None


@pytest.mark.trains
def test_who_may_read_a_config_may_read_the_weights(package, tmp_path):
    """They are handed on, and safetensors writes them for their owner alone."""
    files = sorted((tmp_path / "package").rglob("*.safetensors"))
    modes = [stat.S_IMODE(file.stat().st_mode) for file in [tmp_path / "package" / "config.json", *files]]
    assert len(files) == 3 and len(set(modes)) == 1
