"""What is measured, and how often."""

import pytest
from conftest import randomize, sums

from fedbiot_trainer.evaluation import evaluator as module


@pytest.fixture
def measured(monkeypatch):
    """What was measured: the function, and whether of the full model."""
    seen = []
    for name, real in (("evaluate_loss", module.evaluate_loss), ("complete", module.complete)):

        def spy(model, *args, name=name, real=real):
            seen.append((name, model.base_model.model.config.num_hidden_layers))
            return real(model, *args)

        monkeypatch.setattr(module, name, spy)
    return seen


def test_with_the_same_loras_nothing_is_measured_twice(make_runner, measured):
    settings = {"num_rounds": 1, "eval_metric": "exact_match", "eval_max_new_tokens": 2, "eval_dataset": sums(50, 55)}
    runner = make_runner(**settings, plug_in_scales=[0.5, 1.0])
    runner.train()
    full, emulator = 8, 5
    assert sorted(measured) == sorted(
        [("evaluate_loss", full)] * 3  # zero-shot, the round's AdapFu at full strength, and at half of it
        + [("evaluate_loss", emulator)]
        + [("complete", full)] * 2
        + [("complete", emulator)]
    )
    measured.clear()
    runner.evaluator.adapted(generate=True)
    runner.evaluator.zero_shot(generate=True)
    assert measured == []
    again = runner.evaluate()  # a user asks for it
    assert len(measured) == 6 and again["adap_fu"] == pytest.approx(runner.summary.adap_fu)


def test_zero_shot_of_other_sets_is_not_taken(make_runner):
    runner = make_runner(eval_metric="exact_match", eval_max_new_tokens=2)
    evaluator = runner.evaluator
    expected = evaluator.zero_shot(generate=True)
    for scores in (None, {"loss": 1.0}, {**expected, "loss": 1.0}):
        evaluator.forget()
        evaluator.remember_zero_shot(scores)
        again = evaluator.zero_shot(generate=True)
        assert again == {**expected, "loss": 1.0 if scores and len(scores) > 1 else expected["loss"]}


def test_other_loras_are_measured(make_runner, measured):
    runner = make_runner()
    before = runner.evaluate()
    server = runner.server
    server.client_lora, emulator_lora = randomize(server.models.adap_emu, "client", "emulator")
    server.install_loras()
    measured.clear()
    after = runner.evaluator.adapted()
    assert len(measured) == 2
    assert after["adap_fu"] != before["adap_fu"] and after["adap_emu"] != before["adap_emu"]
    server.emulator_lora = emulator_lora  # which the full model has not
    server.install_loras()
    measured.clear()
    assert runner.evaluator.adapted()["adap_fu"] == after["adap_fu"]
    assert [layers for _, layers in measured] == [5]


def test_losses_alone_are_asked_for(make_runner):
    runner = make_runner(eval_metric="exact_match", eval_max_new_tokens=2)
    runner.evaluate()
    assert "exact_match" in runner.evaluator.adapted(generate=True)["adap_fu"]
    assert "exact_match" not in runner.evaluator.adapted()["adap_fu"]
    assert "exact_match" not in runner.evaluator.zero_shot()
