"""The client LoRA learns in the full model what it does in the emulator."""

import json
import os
import signal

import pytest
import torch
from conftest import assert_same, base_tensors, changed, randomize, sums, tiny_model
from peft import LoraConfig, PeftModel
from rich.console import Console
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fedbiot_trainer.federation import plug_in as learning_side
from fedbiot_trainer.federation.interruption import RunInterrupted
from fedbiot_trainer.federation.observers import run_progress
from fedbiot_trainer.federation.plug_in import learn
from fedbiot_trainer.server import plug_in
from fedbiot_trainer.shared.lora_state import get_lora_state, is_a, load_lora
from fedbiot_trainer.shared.records import RunSummary
from fedbiot_trainer.shared.round_trainer import DivergenceError
from fedbiot_trainer.shared.selection import Selection


FLOAT32 = torch.finfo(torch.float32).eps


def with_loras(make_runner, **settings):
    """A runner that has not trained, with random LoRAs in place of trained ones."""
    runner = make_runner(**{"plug_in_steps": 30, **settings})
    server = runner.server
    server.client_lora, server.emulator_lora = randomize(server.models.adap_emu, "client", "emulator")
    server.install_loras()
    return runner


def logits(models, batch):
    """Of the full model and the emulator, without and with the client LoRA."""
    client = get_lora_state(models.adap_emu, "client")
    values = []
    for state in ({key: torch.zeros_like(tensor) for key, tensor in client.items()}, client):
        models.plug_in(state)
        models.adap_emu.load_state_dict(
            {key.replace(".weight", ".client.weight"): tensor for key, tensor in state.items()}, strict=False
        )
        values.append([model.eval()(**batch).logits for model in (models.adap_fu, models.adap_emu)])
    return values


@pytest.mark.parametrize(
    "places", [{}, {"num_adapter_layers": 1, "num_adapter_layers_bottom": 1}], ids=["on top", "both ends"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_is_the_formula(make_runner, batch, places, dropout):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    runner = with_loras(make_runner, model=tiny_model(dtype=torch.float64), peft_config=lora, **places)
    trainer, models, mask = runner.server.plug_in_trainer, runner.server.models, batch["attention_mask"].bool()
    with torch.no_grad():
        (full, before), (student, after) = logits(models, batch)
        teacher = (full + after - before).log_softmax(-1)
        expected = (
            F.kl_div(student.log_softmax(-1)[mask], teacher[mask], log_target=True, reduction="sum") / mask.sum()
        )
    assert not torch.allclose(after, before, atol=1e-2)  # else there was nothing to learn
    for model in (models.adap_fu, models.adap_emu):
        model.train()
    loss = trainer.compute_loss(models.adap_fu, dict(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=16 * FLOAT32)  # in which logits are
    assert models.adap_fu.training


def test_it_trains_the_full_models_client_lora_alone(make_runner, model):
    runner = with_loras(make_runner, model=model, alignment_learning_rate=3e-3)
    server = runner.server
    full, emulator = base_tensors(model), {k: v.clone() for k, v in server.models.adap_emu.state_dict().items()}
    divergences = server.learn_plug_in()
    assert len(divergences) == 30 and sum(divergences[-5:]) < 0.7 * sum(divergences[:5])
    assert changed(full, model) == []
    assert_same(server.models.adap_emu.state_dict(), emulator)
    assert all(not torch.equal(server.plug_in_lora[key], tensor) for key, tensor in server.client_lora.items())
    assert not any(parameter.requires_grad for parameter in server.models.adap_fu.parameters())
    assert not server.models.adap_fu.training


def test_frozen_matrices_stay(make_runner):
    server = with_loras(make_runner, freeze_a=True, plug_in_steps=2).server
    server.learn_plug_in()
    same = {key for key, tensor in server.client_lora.items() if torch.equal(server.plug_in_lora[key], tensor)}
    assert same == {key for key in server.client_lora if is_a(key)}


def test_a_run_ends_with_it(make_runner, tmp_path):
    """It is in the full model alone: rounds, the clients' LoRA and what a resumed run goes on from have none."""
    tiny_model().save_pretrained(tmp_path / "base")
    plain = make_runner(num_rounds=1, model=str(tmp_path / "base"))
    expected = plain.train()
    settings = {"plug_in_steps": 4, "eval_dataset": None, "overwrite_output_dir": True}
    runner = make_runner(num_rounds=1, model=str(tmp_path / "base"), **settings)
    summary = runner.train()
    learning = summary.plug_in_learning
    assert (learning.steps, learning.kept, learning.metric) == (4, True, None) and learning.first_kl > 0
    assert RunSummary.read(runner.folder.path / "summary.json").plug_in_learning == learning
    assert expected.plug_in_learning is None
    assert_same(runner.server.client_lora, plain.server.client_lora)
    assert_same(load_lora(runner.folder.package / "client_lora")[1], plain.server.client_lora)
    _, saved = load_lora(runner.folder.client_lora)
    assert_same(saved, runner.server.models.split.to_full(runner.server.plug_in_lora))
    tokens = torch.arange(2, 14)[None]
    plugged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), runner.folder.client_lora
    )
    assert torch.allclose(plugged.eval()(tokens).logits, runner.server.models.adap_fu(tokens).logits, atol=1e-5)
    assert "4 steps on public text in the full model" in (runner.folder.client_lora / "README.md").read_text()


def test_a_run_that_is_resumed_at_its_end_learns_the_same(make_runner):
    first = make_runner(num_rounds=1, plug_in_steps=3)
    summary = first.train()
    again = make_runner(num_rounds=1, plug_in_steps=3, resume_from_checkpoint=True)
    assert again.train().plug_in_learning == summary.plug_in_learning
    other = make_runner(num_rounds=1, plug_in_steps=5, resume_from_checkpoint=True)
    assert other.train().plug_in_learning.steps == 5
    assert_same(other.server.client_lora, first.server.client_lora)


@pytest.mark.parametrize(
    "scores, selection, kept",
    [
        ([2.0, 1.5], Selection(), True),
        ([2.0, 2.5], Selection(), False),
        ([2.0, float("nan")], Selection(), False),
        ([2.0, 1.5], Selection("eval_adap_emu_loss"), True),
        ([0.2, 0.5], Selection("eval_adap_fu_token_accuracy", True), True),
    ],
    ids=["better", "worse", "not a number", "no metric of AdapFu", "greater is better"],
)
def test_it_is_kept_where_it_is_better(make_runner, monkeypatch, scores, selection, kept):
    runner = with_loras(make_runner, plug_in_steps=2)
    server, left = runner.server, iter(scores)
    scripted = lambda: dict.fromkeys(("loss", "token_accuracy"), next(left))  # noqa: E731
    monkeypatch.setattr(runner.evaluator, "adap_fu", scripted)
    learning = learn(server, runner.evaluator, selection)
    assert (learning.kept, learning.before) == (kept, scores[0])
    assert json.dumps(learning.after) == json.dumps(scores[1])
    assert (server.plug_in_lora is not None) == kept
    assert_same(server.models.extract(), server.plug_in_lora if kept else server.client_lora)


def test_what_diverges_is_left_out(make_runner, monkeypatch):
    runner, said = with_loras(make_runner), []

    def diverge(steps):
        raise DivergenceError("The loss of the client LoRA is not finite in step 3 of 30.")

    monkeypatch.setattr(runner.server.plug_in_trainer, "take_steps", diverge)
    monkeypatch.setattr(learning_side.logger, "warning", said.append)
    assert learn(runner.server, None, Selection()) is None
    assert said == [
        "The client LoRA is plugged in as clients left it: The loss of the client LoRA is not finite in step 3 of 30."
    ]
    assert_same(runner.server.models.extract(), runner.server.client_lora)
    assert runner.server.plug_in_lora is None


def test_strengths_are_those_of_what_was_learned(make_runner):
    runner = make_runner(num_rounds=1, plug_in_steps=3, plug_in_scales=[0.5], eval_dataset=sums(40, 45))
    summary = runner.train()
    assert summary.plug_in.scale == 0.5
    server = runner.server
    source = server.client_lora if server.plug_in_lora is None else server.plug_in_lora
    state = server.models.extract()
    assert all(torch.equal(state[key], tensor if is_a(key) else 0.5 * tensor) for key, tensor in source.items())


def test_nothing_dropped_leaves_nothing_to_learn(make_runner):
    summary = make_runner(num_rounds=1, plug_in_steps=3, emulator_drop_ratio=0.0).train()
    assert summary.plug_in_learning is None


def test_a_signal_ends_its_step_and_a_resume_learns_the_same(make_runner, monkeypatch, capsys):
    whole = make_runner(num_rounds=1, plug_in_steps=4)
    expected = whole.train()
    assert "train_runtime" not in capsys.readouterr().out  # nothing but the run's own lines
    runner = make_runner(num_rounds=1, plug_in_steps=4, overwrite_output_dir=True)
    trainer, losses = runner.server.plug_in_trainer, []
    compute_loss = trainer.compute_loss

    def told_to_stop(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        if len(losses) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses[-1]

    monkeypatch.setattr(trainer, "compute_loss", told_to_stop)
    with pytest.raises(RunInterrupted, match="stopped by SIGTERM"):
        runner.train()
    assert len(losses) == 2
    again = make_runner(num_rounds=1, plug_in_steps=4, resume_from_checkpoint=True)
    assert again.train().plug_in_learning == expected.plug_in_learning
    assert_same(again.server.models.extract(), whole.server.models.extract())


def test_what_cannot_learn_is_refused(make_runner, make_args, monkeypatch):
    with pytest.raises(ValueError, match="`plug_in_steps` is -1, but it cannot be negative"):
        make_args(plug_in_steps=-1)
    with pytest.raises(ValueError, match="`plug_in_steps` is 3, but nothing is aligned on public text"):
        make_args(plug_in_steps=3, initial_alignment_steps=0, alignment_steps=0)
    monkeypatch.setattr(plug_in, "shards_parameters", lambda accelerator: True)
    with pytest.raises(ValueError, match="`plug_in_steps` is 3, but DeepSpeed ZeRO-3 and FSDP2 shard"):
        make_runner(plug_in_steps=3)


def test_its_steps_are_counted(make_runner):
    runner = make_runner(num_rounds=2, plug_in_steps=3)
    before = 3 + 2 * (2 * 3 + 2)  # of the alignment, and of two rounds of two clients
    progress = run_progress(runner.args, 2, True, Console(quiet=True), None)
    assert progress.total_steps == before + 3
    progress.round_ended(2)
    assert progress.steps_done == before
    for _ in range(3):
        progress.step(0.1)
    assert progress.eta == "0:00"
