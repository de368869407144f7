import json
from contextlib import nullcontext

import pytest
import torch
from conftest import (
    HALF_THE_DIGITS,
    LORA,
    assert_same_model,
    base_tensors,
    changed,
    logged,
    random_lora,
    randomize,
    sums,
    tiny_model,
)
from peft import LoraConfig
from torch.nn import functional as F

from fedbiot_trainer import (
    EmulatorAlignmentTrainer,
    EmulatorPackage,
    FedBiOTConfig,
)
from fedbiot_trainer.server import alignment
from fedbiot_trainer.server.capture import run_full_model
from fedbiot_trainer.shared.lora_layers import folded_loras
from fedbiot_trainer.shared.lora_state import CLIENT, get_lora_state, set_lora_state
from fedbiot_trainer.shared.losses import hidden_state_loss


FLOAT32 = torch.finfo(torch.float32).eps


def test_alignment_trains_the_emulator_lora_alone(make_alignment, model):
    trainer = make_alignment()
    full, base = base_tensors(model), base_tensors(trainer.model)
    client, emulator = (get_lora_state(trainer.model, name) for name in ("client", "emulator"))
    for _ in range(3):
        trainer.train()
    assert changed(full, model) == []
    assert changed(base, trainer.model) == []
    after = get_lora_state(trainer.model, "client")
    assert all(torch.equal(after[key], client[key]) for key in client)
    after = get_lora_state(trainer.model, "emulator")
    assert all(not torch.equal(after[key], emulator[key]) for key in emulator)


def test_alignment_brings_the_emulator_closer(make_alignment):
    trainer = make_alignment(initial_alignment_steps=60)
    trainer.train()
    for name in ("alignment_l2", "alignment_kl"):
        values = trainer.step_metrics[name]
        assert sum(values[-5:]) < 0.8 * sum(values[:5])


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_alignment_loss_is_the_formula(make_alignment, batch, weight):
    trainer = make_alignment(model=tiny_model(dtype=torch.float64), alignment_kl_weight=weight)
    trainer.train()
    full, student, mask = trainer.models.adap_fu.eval(), trainer.model.eval(), batch["attention_mask"]
    with torch.no_grad():
        h_t = full(**batch, output_hidden_states=True).hidden_states[6]
        h_s = student(**batch, output_hidden_states=True).hidden_states[3]
        expected = hidden_state_loss(h_s, h_t, mask)
        log_student, log_teacher = (F.log_softmax(model(**batch).logits, -1) for model in (student, full))
        kl = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        expected += weight * kl[mask.bool()].sum()
        loss = trainer.compute_loss(student, dict(batch))
    assert loss.item() == pytest.approx((expected / mask.sum()).item(), rel=4 * FLOAT32)  # in which it is summed


def test_teacher_is_the_full_model_with_the_current_client_lora(make_alignment, batch):
    trainer = make_alignment()
    models = trainer.models
    before = trainer.compute_loss(trainer.model.eval(), dict(batch))
    states = run_full_model(models, batch)
    models.plug_in(random_lora(get_lora_state(models.adap_emu, "client")))
    after = run_full_model(models, batch)
    assert torch.equal(states.entering, after.entering)
    assert not torch.allclose(states.last, after.last, atol=1e-2)
    assert trainer.compute_loss(trainer.model.eval(), dict(batch)) != before


@pytest.mark.parametrize(("teacher", "num_models"), [("cached", 1), ("online", 2)])
def test_alignment_with_a_folded_client_lora(make_alignment, monkeypatch, teacher, num_models):
    def train(fold):
        models = []
        monkeypatch.setattr(alignment, "folded_loras", lambda *args: models.append(args) or fold(*args))
        torch.manual_seed(0)
        trainer = make_alignment(model=tiny_model(dtype=torch.float64), teacher=teacher)
        trainer.models.plug_in(*randomize(trainer.model, "client"))
        trainer.train()
        assert len(models) == num_models
        return trainer.step_metrics, get_lora_state(trainer.model, "emulator")

    (metrics, lora), (expected_metrics, expected) = train(folded_loras), train(lambda *args: nullcontext())
    for name, values in expected_metrics.items():
        assert metrics[name] == pytest.approx(values, rel=4 * FLOAT32)
    for name, tensor in expected.items():
        assert torch.allclose(lora[name], tensor, rtol=0, atol=HALF_THE_DIGITS)


def test_no_emulator_to_align(make_alignment):
    with pytest.raises(
        ValueError, match="`num_adapter_layers` is -1, which takes all layers, so there is no emulator"
    ):
        make_alignment(num_adapter_layers=-1)


def test_nothing_to_align_when_nothing_is_dropped(make_alignment, batch):
    trainer = make_alignment(emulator_drop_ratio=0.0)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == 0


def test_teacher_and_student_have_the_same_precision(make_alignment):
    trainer = make_alignment(emulator_drop_ratio=0.0, bf16=True, initial_alignment_steps=1)
    trainer.train()
    assert trainer.step_metrics["alignment_l2"] == [0.0]
    assert trainer.step_metrics["alignment_kl"] == [0.0]


def test_no_dropout_in_alignment(make_args, tokenizer, batch):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    trainer = EmulatorAlignmentTrainer(model, make_args(), sums(0, 8), config, processing_class=tokenizer)
    trainer.train()
    trainer.model.train()
    losses = {trainer.compute_loss(trainer.model, dict(batch)).item() for _ in range(3)}
    assert len(losses) == 1
    assert trainer.model.training


def test_alignment_alone_from_a_model_by_name(make_args, model, tokenizer, tmp_path, batch):
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    trainer = EmulatorAlignmentTrainer(
        str(tmp_path / "full"), make_args(), train_dataset=sums(40, 50), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(tmp_path / "package")
    loaded = EmulatorPackage.load(tmp_path / "package").peft_model().eval()
    vars(trainer.model.get_base_model()).pop("forward")  # TRL's, with which a copy would run the original
    assert_same_model(loaded, trainer.model, batch)


def test_alignment_alone_counts_its_own_steps(make_args, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fedbiot_trainer.server.hidden_states.SHARD_BYTES", 1)  # a file for each text
    args = make_args(num_rounds=100, alignment_lr_scheduler_type="linear", logging_steps=1, save_steps=1)
    trainer = EmulatorAlignmentTrainer(tiny_model(), args, sums(0, 50), processing_class=tokenizer)
    progress = []
    trainer.prepare_teacher(lambda *numbers: progress.append(numbers))
    assert progress[-1] == (12, 12)  # 3 steps of 4 texts
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_dropped_layers_are_not_in_the_package(package, make_args, tokenizer, tmp_path):
    model = tiny_model()
    dropped = [1, 2, 4]
    content = b"".join(file.read_bytes() for file in (tmp_path / "package").rglob("*") if file.is_file())
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            if "norm" in name:  # all ones in every layer
                continue
            inside = parameter.detach().numpy().tobytes() in content
            assert inside == (index not in dropped), (index, name)
    config = json.loads((tmp_path / "package" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5


def test_loras_of_a_split_model_are_settled(make_alignment, make_args, tokenizer):
    models = make_alignment().models
    with pytest.raises(ValueError, match="`peft_config` was passed with a `SplitModel`, which has its LoRAs"):
        EmulatorAlignmentTrainer(models, make_args(), sums(0, 8), peft_config=LORA, processing_class=tokenizer)


def test_config_defaults_work_for_both_trainers(tmp_path, model, tokenizer):
    args = FedBiOTConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = EmulatorAlignmentTrainer(model, args, sums(0, 4), processing_class=tokenizer)
    assert (trainer.args.max_steps, trainer.total_steps) == (500, 500)


def test_the_best_of_its_evaluations(make_args, tokenizer):
    """It is loaded, as a trainer's is: here the loss rises."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = make_args(load_best_model_at_end=True, alignment_learning_rate=1.0, initial_alignment_steps=4, **settings)
    trainer = EmulatorAlignmentTrainer(
        tiny_model(), args, sums(40, 60), LORA, eval_dataset=sums(60, 64), processing_class=tokenizer
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert min(losses) == trainer.state.best_metric < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_strategy": "steps"},
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
    ],
    ids=str,
)
def test_a_best_model_that_is_not_saved(make_alignment, settings):
    with pytest.raises(ValueError, match="`load_best_model_at_end` is True, but evaluations .* do not come together"):
        make_alignment(load_best_model_at_end=True, **settings)


def test_metrics_of_an_evaluation_are_a_process_s_own(make_alignment, monkeypatch):
    trainer = make_alignment()
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    mask = torch.ones(2, 3)
    assert trainer.mean("alignment_l2", torch.tensor(12.0), mask, None) == 2.0
    assert trainer.mean("alignment_l2", torch.tensor(12.0), mask, torch.tensor(12)) == 2.0  # of 12 in both


@pytest.mark.parametrize("teacher", ["cached", "online"])
def test_alone_the_teacher_has_the_client_lora_of_now(make_alignment, teacher):
    trainer = make_alignment(teacher=teacher, alignment_learning_rate=1e-12)
    set_lora_state(trainer.model, CLIENT, random_lora(get_lora_state(trainer.model, CLIENT), size=0.3))
    trainer.train()
    online = make_alignment(teacher="online", alignment_learning_rate=1e-12)
    state = get_lora_state(trainer.model, CLIENT)
    set_lora_state(online.model, CLIENT, state)
    online.models.plug_in(state)
    online.train()
    assert trainer.step_metrics["alignment_kl"] == pytest.approx(online.step_metrics["alignment_kl"], rel=1e-4)
