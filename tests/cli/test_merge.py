import pytest
import torch
from conftest import assert_same_model, save_result, tiny_model, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedbiot_trainer.cli.merge import main, merge


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_emulator_package_becomes_adap_emu(any_model, tokenizer, batch, tmp_path):
    models, package = trained(any_model)
    package.save(tmp_path / "package", tokenizer)
    merge(tmp_path / "package", tmp_path / "adap_emu")
    merged = load(tmp_path / "adap_emu")
    assert_same_model(merged, models.adap_emu, batch)
    assert not torch.allclose(logits(merged, batch), logits(load(tmp_path / "package"), batch), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "adap_emu")("1+2=").input_ids == tokenizer("1+2=").input_ids
    assert not list((tmp_path / "adap_emu").rglob("*lora*")) and not (tmp_path / "adap_emu" / "fedbiot.json").exists()


@pytest.mark.parametrize("num_adapter_layers", [2, -1], ids=["two LoRAs", "all layers are adapter layers"])
def test_merging_leaves_the_package_and_the_full_model_alone(model, batch, num_adapter_layers):
    before, plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model, batch)
    models, package = trained(model, num_adapter_layers)
    assert (package.emulator_config is None) == (num_adapter_layers == -1)
    for _ in range(2):
        assert_same_model(package.merged(), models.adap_emu, batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize("named", ["in the folder", "on the command line"])
def test_client_lora_becomes_adap_fu(model, tokenizer, batch, tmp_path, named, capsys):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    models, package = trained(model)
    base, option = str(tmp_path / "base"), []
    if named == "on the command line":
        base, option = "gone", ["--base_model", base]
    folder = save_result(models, package, tmp_path / "client_lora", base)
    main([str(folder), str(tmp_path / "adap_fu"), *option])
    merged = load(tmp_path / "adap_fu")
    assert_same_model(merged, models.adap_fu, batch)
    assert f"{merged.num_parameters():,} parameters in float32, in " in capsys.readouterr().out


def test_sum_has_the_dtype_that_is_asked_for(tokenizer, tmp_path):
    _, package = trained(tiny_model(dtype=torch.bfloat16))
    package.save(tmp_path / "package", tokenizer)
    rounded = merge(tmp_path / "package", tmp_path / "rounded").state_dict()
    whole = merge(tmp_path / "package", tmp_path / "whole", dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    layer = {key: tensor for key, tensor in package.emulator_lora.items() if "layers.0.mlp.up_proj" in key}
    a, b = (next(tensor for key, tensor in layer.items() if f"lora_{x}" in key) for x in "AB")
    scaling = package.emulator_config.lora_alpha / package.emulator_config.r
    exact = package.model.state_dict()[name].float() + scaling * b.float() @ a.float()
    assert torch.allclose(whole[name], exact, atol=1e-6)
    assert rounded[name].dtype == torch.bfloat16
    assert 1e-4 < (rounded[name].float() - exact).abs().max() < 2e-2


def test_output_that_holds_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    for output in (tmp_path / "out", tmp_path / "out" / "thesis.txt"):
        with pytest.raises(FileExistsError, match=f"`output` is '{output}', which is there and is not empty"):
            merge(tmp_path, output)


def test_folder_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is neither an emulator package .* nor a client LoRA"):
        merge(tmp_path, tmp_path / "out", base_model="m")
    with pytest.raises(SystemExit, match="fedbiot merge: error: `folder` is .*, which is neither"):
        main([str(tmp_path), str(tmp_path / "out")])


def test_wrong_full_model_is_refused(model, tmp_path):
    models, package = trained(model)
    package.save(tmp_path / "package")
    with pytest.raises(ValueError, match="`base_model` is 'm', but .* is an emulator package, which has its own"):
        merge(tmp_path / "package", tmp_path / "out", base_model="m")
    with pytest.raises(ValueError, match="a LoRA for the layers of the emulator package around it"):
        merge(tmp_path / "package" / "client_lora", tmp_path / "out", base_model="m")
    with pytest.raises(ValueError, match="`base_model` is None, and .* does not name the full model"):
        merge(save_result(models, package, tmp_path / "client_lora", None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_package_that_cannot_be_merged_any_more_is_refused(model):
    _, package = trained(model)
    parameter = next(package.model.parameters())
    parameter.ds_id = 0  # as DeepSpeed marks what it has sharded
    with pytest.raises(ValueError, match="The package's model is sharded"):
        package.merged()
    del parameter.ds_id
    package.peft_model()
    with pytest.raises(
        ValueError, match=r"`peft_model\(\)`, or a trainer, has put the LoRAs on this package's model already"
    ):
        package.merged()
