import json

import pytest
import torch
from conftest import assert_same_model, sums, tiny_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from fedbiot_trainer import ClientSFTTrainer
from fedbiot_trainer.cli.merge import main, merge
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.lora_state import get_lora_state


@pytest.fixture(params=[0, 1], ids=["top", "both ends"])
def trained(request, make_args, tokenizer, tmp_path):
    """A base model, its package, and what a client's own trainer saves: the folder, and the models with that LoRA."""
    models = SplitModel(
        tiny_model(), 2, 0.5, LoraConfig(r=4, target_modules="all-linear"), num_adapter_layers_bottom=request.param
    )
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loras = (get_lora_state(models.adap_emu, name) for name in ("client", "emulator"))
    models.package(*loras).save(tmp_path / "package", tokenizer)
    trainer = ClientSFTTrainer(str(tmp_path / "package"), make_args(), sums(0, 8), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "own")
    models.plug_in(get_lora_state(trainer.model, "client"))
    vars(trainer.model.get_base_model()).pop("forward")  # TRL's, with which a copy would run the original
    return tmp_path, trainer.model, models.adap_fu


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_lora_of_a_client_says_what_it_is_for(trained):
    folder, model, _ = trained
    text = (folder / "own" / "README.md").read_text()
    layers = json.loads((folder / "own" / "adapter_config.json").read_text())["layers_to_transform"]
    number = model.config.num_hidden_layers
    assert f"on the layers {', '.join(map(str, layers))} of an emulator package of {number} layers" in text


def test_lora_of_a_client_with_its_package(trained, batch):
    folder, adap_emu, adap_fu = trained
    merge(folder / "own", folder / "adap_emu", package=folder / "package")
    main([str(folder / n) for n in ("own", "adap_fu")] + ["--package", str(folder / "package"), "--base_model", str(folder / "base")])  # fmt: skip
    plain = logits(AutoModelForCausalLM.from_pretrained(folder / "base"), batch)
    for name, expected in (("adap_emu", adap_emu), ("adap_fu", adap_fu)):
        merged = AutoModelForCausalLM.from_pretrained(folder / name)
        assert_same_model(merged, expected, batch)
        assert not torch.allclose(logits(merged, batch), plain, atol=1e-2)


def test_lora_of_a_client_is_refused_for_the_full_model(trained):
    folder, *_ = trained
    with pytest.raises(
        ValueError, match=r"whose uppermost layer is \d, but the uppermost layer of LlamaForCausalLM is 7"
    ):
        merge(folder / "own", folder / "out", base_model=str(folder / "base"))
    with pytest.raises(
        ValueError, match="`base_model` is '.*package', which is an emulator package, not a full model"
    ):
        merge(folder / "own", folder / "out", base_model=str(folder / "package"))
    with pytest.raises(ValueError, match="`base_model` is None, and .* does not name the full model"):
        merge(folder / "own", folder / "out")
    assert not (folder / "out").exists()


def test_package_of_another_run_is_refused(trained, tokenizer):
    folder, *_ = trained
    other = SplitModel(tiny_model(), 3, 0.5, LoraConfig(r=4, target_modules="all-linear"))
    loras = (get_lora_state(other.adap_emu, name) for name in ("client", "emulator"))
    other.package(*loras).save(folder / "other", tokenizer)
    with pytest.raises(
        ValueError, match=r"a LoRA on the layers \[.*\], but in `package` .* Name the package that it was"
    ):
        merge(folder / "own", folder / "out", package=folder / "other")
    with pytest.raises(ValueError, match=r"but the adapter layers of `package` .*other' are \[.*\]. Name the package"):
        merge(folder / "own", folder / "out", package=folder / "other", base_model=str(folder / "base"))
    with pytest.raises(FileNotFoundError, match="base' is not an emulator package: it has no fedbiot.json"):
        merge(folder / "own", folder / "out", package=folder / "base")
    with pytest.raises(ValueError, match="`package` is '.*', but .* is an emulator package, which has its own model"):
        merge(folder / "package", folder / "out", package=folder / "other")
    with pytest.raises(FileNotFoundError, match="which is neither an emulator package .* nor a client LoRA"):
        merge(folder / "base", folder / "out", package=folder / "package")
