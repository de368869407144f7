import json
import sys

import pytest
import torch
from conftest import LORA, randomize, slow, sums, tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedbiot_trainer import ClientSFTTrainer, EmulatorAlignmentTrainer, EmulatorPackage, FederatedRunner
from fedbiot_trainer.cli.merge import merge
from fedbiot_trainer.server.layer_dropping import drop_layers
from fedbiot_trainer.server.split import choose_split
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.lora_state import get_lora_state, save_lora, set_trainable_lora
from fedbiot_trainer.shared.text_loss import evaluate_loss


SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # 4-bit blocks have 64 weights


def bnb_4bit(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **options
    )


def bnb_8bit(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, **options)


def torchao_config(name):
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(pytest.importorskip("torchao.quantization"), name)(version=2))


def torchao_8bit():
    return torchao_config("Int8WeightOnlyConfig")


@pytest.fixture(params=[bnb_4bit, bnb_8bit, torchao_8bit])
def quantization(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("base")
    tiny_model(**SIZES).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def load(folder):
    return lambda quantization_config: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config
    )


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def gradients(model, batch):
    set_trainable_lora(model, "emulator")
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def saved(models, path):
    states = get_lora_state(models.adap_emu, "client"), get_lora_state(models.adap_emu, "emulator")
    models.package(*states).save(path)
    return path


def test_emulator_shares_quantized_weights(load, quantization, batch):
    model = load(quantization())
    models = SplitModel(model, 2, 0.5, LORA)
    full = {id(parameter) for parameter in model.parameters()}
    assert all(id(p) in full for name, p in models.adap_emu.named_parameters() if "lora_" not in name)
    assert models.count_parameters().full == sum(p.numel() for p in tiny_model(**SIZES).parameters())

    whole = SplitModel(model, 2, 0.0, LORA)
    whole.plug_in(*randomize(whole.adap_emu, "client"))
    assert torch.equal(logits(whole.adap_fu, batch), logits(whole.adap_emu, batch))
    assert torch.equal(logits(drop_layers(model, choose_split(model, 2, 0.0)), batch), logits(model, batch))


def test_gradient_of_the_lower_layers_is_that_of_the_dequantized_model(load, quantization, batch):
    models = SplitModel(load(quantization()), 2, 0.5, LORA)
    randomize(models.adap_emu, "client", "emulator")
    logits(models.adap_fu, batch)  # the teacher, on the same weights
    found = gradients(models.adap_emu.train(), batch)

    layers = models.adap_emu.get_base_model().model.layers
    for module in [module for layer in layers for module in layer.modules() if hasattr(module, "base_layer")]:
        inputs = torch.eye(module.in_features)
        weight = module.base_layer.train()(inputs).detach().T
        module.base_layer = torch.nn.Linear(*inputs.shape, bias=False)
        module.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    expected = gradients(models.adap_emu, batch)
    assert len(found) == len(expected) == 3 * 7 * 2
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item()), name


@pytest.mark.parametrize("pre_quantized", [False, True], ids=["quantized here", "quantized before"])
def test_package_round_trip(load, quantization, pre_quantized, batch, tmp_path):
    model = load(quantization())
    if pre_quantized:
        model.save_pretrained(tmp_path / "full")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    models = SplitModel(model, 2, 0.5, LORA)
    randomize(models.adap_emu, "client", "emulator")
    expected = logits(models.adap_emu, batch)
    path = saved(models, tmp_path / "package")
    assert "quantization_config" in json.loads((path / "config.json").read_text())
    package = EmulatorPackage.load(path)
    assert torch.equal(logits(package.model, batch), logits(models.package_model, batch))
    assert torch.equal(logits(package.peft_model(), batch), expected)


def test_merging_into_quantized_weights_is_refused(load, quantization, folder, tmp_path):
    models = SplitModel(load(quantization()), 2, 0.5, LORA)
    package = saved(models, tmp_path / "package")
    client_lora = tmp_path / "client_lora"
    save_lora(client_lora, models.adap_fu.peft_config["client"], get_lora_state(models.adap_fu, "client"), folder)
    method = models.package_model.hf_quantizer.quantization_config.quant_method.value
    for path, options in ((package, {}), (client_lora, {"quantization_config": quantization()})):
        with pytest.raises(ValueError, match=f"The model is quantized with {method}, and merging a LoRA would round"):
            merge(path, tmp_path / "out", **options)


@pytest.mark.parametrize("quantization", [bnb_4bit, slow(bnb_8bit), torchao_8bit], indirect=True)
def test_run_on_a_quantized_model(make_args, folder, quantization, tmp_path):
    quantized = {"quantization_config": quantization()}
    args = make_args(model_init_kwargs=quantized, local_steps=10, alignment_init="auto")
    runner = FederatedRunner(
        folder,
        args,
        {"north": sums(0, 8), "south": sums(8, 12)},
        public_dataset=sums(40, 50),
        eval_dataset=sums(50, 55),
        peft_config=LORA,
    )
    summary = runner.train()
    assert summary.initial_alignment["closed_form_l2"] < 1
    assert summary.adap_fu["loss"] < summary.zero_shot["loss"] - 0.1

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), f"{args.output_dir}/client_lora")
    evaluator = runner.evaluator
    loss = evaluate_loss(model, evaluator.tokens, evaluator.data_collator, 8, evaluator.accelerator)["loss"]
    assert loss == pytest.approx(summary.adap_fu["loss"], abs=0.5)
    merged = evaluate_loss(
        model.merge_and_unload(), evaluator.tokens, evaluator.data_collator, 8, evaluator.accelerator
    )["loss"]
    assert merged == pytest.approx(loss, abs=1e-3)


def test_client_quantizes_the_emulator(make_args, load, quantization, tokenizer, tmp_path):
    path = saved(SplitModel(load(None), 2, 0.5, LORA), tmp_path / "package")
    args = make_args(model_init_kwargs={"quantization_config": quantization()}, local_steps=10)
    trainer = ClientSFTTrainer(str(path), args, sums(0, 8), processing_class=tokenizer)
    trainer.train()
    assert trainer.model.is_quantized
    assert trainer.step_metrics["sft_loss"][-1] < trainer.step_metrics["sft_loss"][0] - 0.5


def test_lora_keeps_its_dtype(make_args, load, tokenizer):
    trainer = EmulatorAlignmentTrainer(
        load(bnb_4bit()), make_args(), sums(40, 60), peft_config=LORA, processing_class=tokenizer
    )
    trainer.train()
    ClientSFTTrainer(trainer.models.adap_emu, make_args(), sums(0, 8), processing_class=tokenizer)
    state = get_lora_state(trainer.models.adap_emu, "emulator")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("config", [bnb_4bit, bnb_8bit])
def test_layers_left_unquantized_are_renumbered(load, config, batch, tmp_path):
    skipped = ["model.layers.7.mlp", "model.layers.1.self_attn", "model.layers.3.mlp.up_proj", "lm_head"]
    model = load(config(llm_int8_skip_modules=skipped))
    models = SplitModel(model, 2, 0.5, LORA)
    expected = ["model.layers.4.mlp", "model.layers.1.mlp.up_proj", "lm_head"]
    assert models.package_model.config.quantization_config.llm_int8_skip_modules == expected
    assert model.config.quantization_config.llm_int8_skip_modules == skipped
    package = EmulatorPackage.load(saved(models, tmp_path))
    assert torch.equal(logits(package.model, batch), logits(models.package_model, batch))


def test_quantization_that_cuts_the_gradient_is_refused(make_args, load, tokenizer):
    model = load(torchao_config("Int8DynamicActivationInt8WeightConfig"))
    with pytest.raises(ValueError, match="quantized with torchao so that its layers do not hand gradients on.*0%"):
        EmulatorAlignmentTrainer(model, make_args(), sums(40, 60), peft_config=LORA, processing_class=tokenizer)


def test_quantization_that_cannot_be_saved_is_refused(load, monkeypatch):
    model = load(bnb_8bit())
    monkeypatch.setattr(model.hf_quantizer, "is_serializable", lambda: False)
    with pytest.raises(ValueError, match="quantized with bitsandbytes, which transformers cannot save"):
        SplitModel(model, 2, 0.5, LORA)


def test_layers_that_the_config_cannot_describe_are_refused(tmp_path):
    tiny_model(
        "deepseek_v3", **SIZES, first_k_dense_replace=3, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bnb_8bit())
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM, in which .* depends on the layer's position"):
        drop_layers(model, choose_split(model, 2, 0.5))


def test_model_that_was_repacked_for_inference_is_refused(load, batch):
    model = load(bnb_4bit())
    if not model.model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16")
    logits(model, batch)
    with pytest.raises(ValueError, match="LlamaForCausalLM whose .*q_proj` bitsandbytes has repacked"):
        SplitModel(model, 2, 0.5, LORA)


def test_missing_library_is_named(folder, load, tmp_path, monkeypatch):
    path = saved(SplitModel(load(None), 2, 0.5, LORA), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": {}}}
    (path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    with pytest.raises(ImportError, match="is quantized with torchao, which is not installed: `pip install torchao`"):
        EmulatorPackage.load(path)
