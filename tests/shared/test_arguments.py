"""What the runner and the trainers begin with: a wrong kind is named at once, a path is as good as a name."""

from pathlib import Path

import pytest
import torch
from conftest import LORA, assert_same, save_files, sums, tiny_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback
from trl import SFTConfig

from fedbiot_trainer import ClientSFTTrainer, EmulatorAlignmentTrainer, FederatedRunner, FederatedServer, run_method
from fedbiot_trainer.shared.lora_state import get_lora_state


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"model": None},
            TypeError,
            "`model` must be a name on the Hub, a folder or a `PreTrainedModel`, got NoneType",
        ),
        ({"model": type(tiny_model())}, TypeError, "`model` must be .*, got the class `LlamaForCausalLM`"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "`model` must be .*, got Linear"),
        ({"model": "/gone"}, FileNotFoundError, "`model` is '/gone', but there is no such folder"),
        (
            {"model": Path("gone") / "to" / "b"},
            FileNotFoundError,
            "`model` is 'gone/to/b', but there is no such folder",
        ),
        ({"args": {"num_rounds": 1}}, TypeError, "`args` must be a `FedBiOTConfig`, got dict"),
        ({"args": SFTConfig("out", use_cpu=True)}, TypeError, "`args` must be a `FedBiOTConfig`, got SFTConfig"),
        (
            {"callbacks": EarlyStoppingCallback()},
            TypeError,
            "`callbacks` must be a list .*, got EarlyStoppingCallback",
        ),
        ({"callbacks": [int]}, TypeError, "`callbacks` has the class `int`, but each must be a `TrainerCallback`"),
        ({"client_datasets": [sums(0, 2), sums(2, 4)]}, TypeError, "`client_datasets` has a Dataset that is no pair"),
    ],
    ids=[
        *(
            "no model",
            "a class",
            "a module",
            "a folder that is not there",
            "a path that is not there",
            "a dict",
            "TRL's",
        ),
        *("one callback", "a class that is none", "datasets without names"),
    ],
)
def test_runner(make_args, tokenizer, changes, error, message):
    given = {
        **{"model": tiny_model(), "args": make_args(), "client_datasets": {"north": sums(0, 8)}},
        **{"public_dataset": sums(40, 50), "processing_class": tokenizer, **changes},
    }
    with pytest.raises(error, match=message):
        FederatedRunner(**given)


def test_the_others(make_args, tokenizer):
    text, plain = sums(0, 8), SFTConfig("out", use_cpu=True)
    wrong = "`args` must be a `FedBiOTConfig`, got SFTConfig"
    for make in (
        lambda: run_method("fedbiot", tiny_model(), plain, {"north": text}),
        lambda: EmulatorAlignmentTrainer(tiny_model(), plain, text),
        lambda: ClientSFTTrainer("package", plain, text),
        lambda: FederatedServer(tiny_model(), plain, text, tokenizer),
    ):
        with pytest.raises(TypeError, match=wrong):
            make()
    with pytest.raises(TypeError, match="a `PreTrainedModel` or a `SplitModel`, got int"):
        EmulatorAlignmentTrainer(3, make_args(), text)
    with pytest.raises(
        TypeError, match="an emulator package's folder, an `EmulatorPackage` or a `PeftModel`, got LlamaForCausalLM"
    ):
        ClientSFTTrainer(tiny_model(), make_args(), text)


def test_callbacks_of_a_trainer(make_args, package):
    with pytest.raises(TypeError, match="`callbacks` must be a list .*, got EarlyStoppingCallback"):
        ClientSFTTrainer(package, make_args(), sums(0, 8), callbacks=EarlyStoppingCallback())


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2"])
def test_a_folder_without_a_tokenizer(make_args, tmp_path, model_type):
    """Of which transformers makes one that knows special tokens alone."""
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for model in (tmp_path / "base", loaded):
        with pytest.raises(ValueError, match="`processing_class` has no token but special ones"):
            FederatedRunner(model, make_args(), {"north": sums(0, 8)}, public_dataset=sums(40, 50), peft_config=LORA)
    loaded.config.name_or_path = str(tmp_path / "gone" / "from" / "here")
    with pytest.raises(
        ValueError, match="`processing_class` is None, and '.*here', where `model` was loaded from, has no"
    ):
        FederatedRunner(loaded, make_args(), {"north": sums(0, 8)}, public_dataset=sums(40, 50), peft_config=LORA)


def test_a_path_is_a_name_and_brings_its_tokenizer(make_args, tokenizer, tmp_path):
    base = save_files(tmp_path, tokenizer) / "base"
    loaded = AutoModelForCausalLM.from_pretrained(base)
    results = []
    for model in (str(base), base, loaded):
        args = make_args(num_rounds=1, overwrite_output_dir=True)
        runner = FederatedRunner(model, args, {"north": sums(0, 8)}, public_dataset=sums(40, 50), peft_config=LORA)
        runner.train()
        assert runner.server.processing_class.get_vocab() == tokenizer.get_vocab()
        results.append(runner.server.client_lora)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_package_by_its_path(package, make_args, tokenizer):
    by_name, by_path = (
        ClientSFTTrainer(folder, make_args(), sums(0, 8), processing_class=tokenizer)
        for folder in (package, Path(package))
    )
    assert_same(get_lora_state(by_path.model, "client"), get_lora_state(by_name.model, "client"))
