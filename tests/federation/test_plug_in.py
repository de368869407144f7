"""The strength at which the client LoRA is plugged in to the full model."""

import json

import pytest
import torch
from conftest import assert_same, sums
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedbiot_trainer.cli.merge import merge
from fedbiot_trainer.federation.plug_in import choose_scale
from fedbiot_trainer.shared.lora_state import get_lora_state, is_a, load_lora, scaled
from fedbiot_trainer.shared.records import RunSummary
from fedbiot_trainer.shared.selection import Selection


@pytest.fixture
def adap_fu(monkeypatch):
    """Let a runner's evaluator find AdapFu's loss by its client LoRA's strength, as the LoRA of the full model shows it."""

    def script(runner, losses):
        server, real = runner.server, runner.evaluator.adap_fu

        def scores(generate=False):
            state = server.models.extract()
            key = next(key for key in state if not is_a(key) and server.client_lora[key].any())
            strength = (state[key].norm() / server.client_lora[key].norm()).item()
            return real(generate) | {"loss": losses[round(strength, 3)]}

        monkeypatch.setattr(runner.evaluator, "adap_fu", scores)
        return runner

    return script


def run(make_runner, **settings):
    return make_runner(num_rounds=1, **{"plug_in_scales": [0.25, 0.5, 1.0], **settings})


def test_the_best_is_in_the_result(make_runner, adap_fu):
    runner = adap_fu(run(make_runner), {0.25: 1.4, 0.5: 1.3, 1.0: 1.5})
    summary = runner.train()
    plug_in = summary.plug_in
    assert (plug_in.scale, plug_in.metric) == (0.5, "eval_adap_fu_loss")
    assert plug_in.values == {"0.25": 1.4, "0.5": 1.3, "1": 1.5}
    assert summary.adap_fu["loss"] == 1.3
    assert runner.records[-1].adap_fu_loss == 1.5  # rounds are at full strength
    assert RunSummary.read(runner.folder.path / "summary.json").plug_in == plug_in
    assert "plugged in at 0.5 of its strength in training, the best of 0.25, 0.5, 1 by eval_adap_fu_loss" in (
        (runner.folder.client_lora / "README.md").read_text()
    )


def test_clients_keep_theirs(make_runner, adap_fu):
    """The factor is in the full model alone: AdapEmu, the package, and what a resumed run goes on from have none."""
    plain = make_runner(num_rounds=1)
    expected = plain.train()
    runner = adap_fu(run(make_runner, overwrite_output_dir=True), {0.25: 1.2, 0.5: 1.3, 1.0: 1.5})
    summary = runner.train()
    assert summary.adap_emu == expected.adap_emu
    assert_same(runner.server.client_lora, plain.server.client_lora)
    assert_same(load_lora(runner.folder.package / "client_lora")[1], plain.server.client_lora)
    _, saved = load_lora(runner.folder.client_lora)
    assert_same(saved, runner.server.models.split.to_full(scaled(plain.server.client_lora, 0.25)))


def test_plain_peft_and_merge_have_the_strength(make_runner, adap_fu, model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    runner = adap_fu(run(make_runner, model=str(tmp_path / "base")), {0.25: 1.4, 0.5: 1.3, 1.0: 1.5})
    runner.train()
    tokens = torch.arange(2, 14)[None]
    ours = runner.server.models.adap_fu(tokens).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plugged = PeftModel.from_pretrained(base, runner.folder.client_lora).eval()(tokens).logits
    merged = merge(runner.folder.client_lora, tmp_path / "merged").eval()(tokens).logits
    assert torch.allclose(plugged, ours, atol=1e-5) and torch.allclose(merged, ours, atol=1e-5)
    runner.server.models.plug_in(runner.server.client_lora)
    assert not torch.allclose(runner.server.models.adap_fu(tokens).logits, ours, atol=1e-3)


def test_it_is_chosen_by_one_of_two_sets(make_runner):
    sets = {"choice": sums(0, 8), "test": sums(60, 65)}
    metric = "adap_fu_choice_loss"
    runner = run(
        make_runner, eval_dataset=sets, metric_for_best_model=metric, plug_in_scales=[0.0, 0.5, 1.0], learning_rate=0.3
    )
    summary = runner.train()
    values = summary.plug_in.values
    assert summary.plug_in.metric == f"eval_{metric}"
    assert values["0"] == pytest.approx(summary.zero_shot["choice_loss"])
    assert values["1"] == pytest.approx(runner.records[-1].scores()[f"eval_{metric}"])
    assert summary.adap_fu["choice_loss"] == pytest.approx(min(values.values()))
    assert len({round(value, 4) for value in values.values()}) == 3


def test_after_the_best_round(make_runner):
    settings = {"load_best_model_at_end": True, "learning_rate": 0.3, "plug_in_scales": [1.0]}
    runner = make_runner(num_rounds=3, **settings)
    summary = runner.train()
    best = runner.records[summary.best_round - 1].adap_fu_loss
    assert summary.plug_in.values["1"] == pytest.approx(best) == pytest.approx(summary.adap_fu["loss"])


def test_a_run_can_be_resumed_with_and_without(make_runner, adap_fu):
    losses = {0.25: 1.2, 0.5: 1.3, 1.0: 1.5}
    first = adap_fu(run(make_runner), losses)
    first.train()
    again = make_runner(num_rounds=1, resume_from_checkpoint=True, plug_in_scales=[0.5, 1.0])
    assert adap_fu(again, losses).train().plug_in.scale == 0.5
    assert_same(again.server.client_lora, first.server.client_lora)
    longer = make_runner(num_rounds=2, resume_from_checkpoint=True)
    assert longer.train().plug_in is None
    _, saved = load_lora(longer.folder.client_lora)
    assert_same(saved, longer.server.models.split.to_full(longer.server.client_lora))


@pytest.mark.parametrize(
    "values, greater, chosen",
    [
        ([3.0, 1.0, 1.0], False, 0.5),
        ([3.0, float("nan"), 2.0], False, 1.5),
        ([float("nan")] * 3, False, 1.0),
        ([3.0, 1.0, 2.0], True, 0.25),
    ],
    ids=["first of equals", "not a number", "no number", "greater is better"],
)
def test_choice(make_runner, monkeypatch, values, greater, chosen):
    runner = make_runner(num_rounds=1)
    scores = iter(values)
    monkeypatch.setattr(runner.evaluator, "adap_fu", lambda: {"loss": next(scores)})
    selection = Selection(greater_is_better=greater)
    plug_in = choose_scale(runner.server, runner.evaluator, [0.25, 0.5, 1.5], selection)
    assert plug_in.scale == runner.server.plug_in_scale == chosen
    assert json.dumps(plug_in.values).count(":") == 3


def test_only_b_is_scaled(make_runner):
    state = get_lora_state(make_runner(num_rounds=1).server.models.adap_emu, "client")
    state = {key: torch.ones_like(tensor) for key, tensor in state.items()}
    assert {tensor.unique().item() for key, tensor in scaled(state, 0.5).items() if is_a(key)} == {1.0}
    assert {tensor.unique().item() for key, tensor in scaled(state, 0.5).items() if not is_a(key)} == {0.5}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eval_dataset": None}, r"`plug_in_scales` is \[0.5, 1.0\], but `eval_dataset` is None"),
        (
            {"metric_for_best_model": "adap_emu_loss"},
            r"`plug_in_scales` is \[0.5, 1.0\], but `metric_for_best_model` is 'eval_adap_emu_loss', which is the same",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(make_runner, settings, message):
    with pytest.raises(ValueError, match=message):
        make_runner(plug_in_scales=[0.5, 1.0], **settings)
