import gc

import pytest
import torch
from conftest import LORA, sums, tiny_model

from fedbiot_trainer import (
    ClientSFTTrainer,
    EmulatorAlignmentTrainer,
)
from fedbiot_trainer.shared.lora_state import get_lora_state
from fedbiot_trainer.shared.round_trainer import frozen_garbage


@pytest.mark.parametrize("party", ["client", "emulator"])
def test_resume_from_a_checkpoint(make_args, tokenizer, tmp_path, party):
    def make():
        settings = {"save_strategy": "steps", "save_steps": 3, "local_steps": 6, "initial_alignment_steps": 6}
        alignment = EmulatorAlignmentTrainer(
            tiny_model(), make_args(**settings), sums(0, 8), LORA, processing_class=tokenizer
        )
        if party == "emulator":
            return alignment
        return ClientSFTTrainer(
            alignment.models.adap_emu, make_args(**settings), sums(0, 8), processing_class=tokenizer
        )

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    expected, state = get_lora_state(whole.model, party), get_lora_state(resumed.model, party)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert resumed.state.global_step == 6


def test_every_training_is_in_mixed_precision(make_runner):
    """Both parties train the same model object in turn, many times."""
    runner = make_runner(num_rounds=2, bf16=True)
    computed = []
    layer = runner.server.models.adap_emu.base_model.model.model.layers[0].mlp
    layer.register_forward_hook(lambda layer, args, output: computed.append((layer.training, output.dtype)))
    runner.train()
    trained = [dtype for training, dtype in computed if training]
    assert len(trained) > 10 and set(trained) == {torch.bfloat16}


def test_code_from_the_hub_needs_a_yes(make_args, tokenizer, monkeypatch, tmp_path):
    loaded = []

    def load(*args, **kwargs):
        loaded.append(kwargs)
        raise OSError("enough")

    monkeypatch.setattr("fedbiot_trainer.wire.package.AutoModelForCausalLM.from_pretrained", load)
    (tmp_path / "fedbiot.json").write_text('{"schema_version": 1, "num_adapter_layers": 2}')
    for trainer, model in ((EmulatorAlignmentTrainer, "owner/model"), (ClientSFTTrainer, str(tmp_path))):
        with pytest.raises(OSError, match="enough"):
            trainer(model, make_args(trust_remote_code=True), sums(0, 8), processing_class=tokenizer)
    assert [kwargs["trust_remote_code"] for kwargs in loaded] == [True, True]


def test_optimizers_are_refused(package, make_args, tokenizer):
    with pytest.raises(ValueError, match="`optimizers` cannot be passed"):
        ClientSFTTrainer(package, make_args(), sums(0, 8), processing_class=tokenizer, optimizers=(object(), None))


def test_what_exists_is_kept_out_of_garbage_collection():
    before = gc.get_freeze_count()
    with pytest.raises(KeyError):
        with frozen_garbage():
            assert gc.get_freeze_count() > before + 10_000
            raise KeyError
    assert gc.get_freeze_count() == before
