import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import ALL_PUBLIC_TEXT, slow, sums
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from fedbiot_trainer.federation.loop import RoundLoop
from fedbiot_trainer.federation.observers import WarnOfNoGain
from fedbiot_trainer.federation.state import FederationState
from fedbiot_trainer.shared.lora_state import load_lora
from fedbiot_trainer.shared.records import RoundRecord
from fedbiot_trainer.shared.selection import choose_selection


LOSSES = [3.0, 2.0, 2.5, 2.7, 1.0]  # AdapFu's, by round

# Rounds in which both LoRAs move, and no more: which of them is the best does not depend on how well they train.
SHORT = {
    "client_datasets": {"north": sums(0, 4)}, "local_steps": 1, "initial_alignment_steps": 1, "alignment_steps": 1,
}  # fmt: skip


@pytest.fixture
def losses(monkeypatch):
    """Let a runner's evaluations find AdapFu's losses in a list: in round `i` the `i`-th, and the last one after it."""

    def script(runner, values, zero_shot=9.0):
        def adapted(generate=False):
            done = runner.trackers.state.global_step  # the round before: callbacks are told after the evaluation
            loss = values[min(done, len(values) - 1)]
            scores = {"loss": loss, "token_accuracy": 1 / loss}
            return {"adap_emu": {"loss": 5.0, "token_accuracy": done / 100}, "adap_fu": scores}

        monkeypatch.setattr(runner.evaluator, "adapted", adapted)
        zero = {"loss": zero_shot, "token_accuracy": 0.0}
        monkeypatch.setattr(runner.evaluator, "zero_shot", lambda generate=False: zero)
        return runner

    return script


class Loras(TrainerCallback):
    """The client LoRA and the emulator LoRA after each round, and what the state tells then."""

    def __init__(self):
        self.client, self.emulator, self.told = [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        server = self.runner.server
        self.client.append(server.client_lora)
        self.emulator.append(server.emulator_lora)
        self.told.append((state.best_global_step, state.best_metric))


def watched(make_runner, losses, values=LOSSES, callbacks=(), **settings):
    watch = Loras()
    settings = {"num_rounds": len(values), "load_best_model_at_end": True, **SHORT, **settings}
    runner = losses(make_runner(callbacks=[watch, *callbacks], **settings), values)
    watch.runner = runner
    return runner, watch


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_result_is(runner, client_lora, emulator_lora):
    """Of the server, the result's folder and the package."""
    assert same(runner.server.client_lora, client_lora) and same(runner.server.emulator_lora, emulator_lora)
    _, saved = load_lora(runner.folder.client_lora)
    assert same(saved, runner.server.models.split.to_full(client_lora))
    for name, lora in (("client_lora", client_lora), ("emulator_lora", emulator_lora)):
        _, packed = load_lora(runner.folder.package / name)
        assert same(packed, lora)


def test_result_is_the_best_round(make_runner, losses):
    runner, watch = watched(make_runner, losses, LOSSES[:4], load_best_model_at_end=None)
    summary = runner.train()
    assert summary.best_round == 2 and summary.rounds == 4
    assert json.loads((runner.folder.path / "summary.json").read_text())["best_round"] == 2
    assert_result_is(runner, watch.client[1], watch.emulator[1])
    assert not same(watch.client[1], watch.client[3])
    assert watch.told == [(1, 3.0), (2, 2.0), (2, 2.0), (2, 2.0)]
    assert "of which round 2 was the best and is this one" in (runner.folder.client_lora / "README.md").read_text()


@pytest.mark.parametrize("unseen", [{"eval_dataset": None}, {"eval_rounds": 0}], ids=str)
def test_without_evaluated_rounds_the_result_is_the_last_one(make_runner, capsys, unseen):
    runner = make_runner(num_rounds=2, **SHORT, **unseen)
    assert runner.train().best_round is None
    said = "result: the last round; without held-out text (`eval_dataset`) nothing says whether another is better"
    assert (said in capsys.readouterr().out) == ("eval_dataset" in unseen)


def test_result_of_the_last_round_if_it_is_asked_for(make_runner, losses):
    """The best round is known all the same, so patience ends the run."""
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    runner, watch = watched(make_runner, losses, callbacks=[stop], load_best_model_at_end=False)
    summary = runner.train()
    assert summary.best_round is None and summary.rounds == 4
    assert_result_is(runner, watch.client[3], watch.emulator[3])
    assert watch.told[-1] == (2, 2.0)  # as a trainer's state does


class EndsAfter(TrainerCallback, ExportableState):
    """Ends the run after a round."""

    def __init__(self, server_round):
        self.server_round, self.told = server_round, []

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.server_round

    def state(self):
        return {"args": {"server_round": self.server_round}, "attributes": {"told": self.told}}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.told.append((state.global_step, metrics["eval_adap_fu_loss"]))


def test_a_run_that_is_ended_between_evaluations(make_runner, losses):
    """Its last round is evaluated, as any run's is."""
    stop = EndsAfter(4)
    runner, watch = watched(make_runner, losses, [9.0, 9.0, 3.0, 9.0, 2.0], [stop], num_rounds=9, eval_rounds=3)
    assert runner.train().best_round == 4
    assert stop.told == [(3, 3.0), (4, 2.0)]
    records = [json.loads(line) for line in runner.folder.rounds.read_text().splitlines()]
    assert [record["adap_fu_loss"] for record in records] == [None, None, 3.0, 2.0]
    assert FederationState.load_newest(runner.folder.state).best.server_round == 4
    assert_result_is(runner, watch.client[3], watch.emulator[3])


def test_a_run_that_was_ended_by_a_callback_can_be_resumed(make_runner):
    settings = {"num_rounds": 9, "eval_rounds": 3, **SHORT}
    make_runner(callbacks=[EndsAfter(2)], **settings).train()
    stop = EndsAfter(2)
    runner = make_runner(callbacks=[stop], resume_from_checkpoint=True, **settings)
    assert runner.train().rounds == 2
    assert len(stop.told) == 1  # of what it is told anew: the last round has been evaluated


@pytest.mark.parametrize(
    "settings, best",
    [
        ({"metric_for_best_model": "eval_adap_emu_token_accuracy"}, 4),
        # These are a trainer's own, which would refuse them together with `load_best_model_at_end`.
        ({"eval_rounds": 3, "save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 7}, 3),
    ],
    ids=str,
)
def test_settings(make_runner, losses, settings, best):
    runner, _ = watched(make_runner, losses, LOSSES[:4], **settings)
    assert runner.train().best_round == best


@pytest.mark.parametrize(
    "settings, best",
    [
        ({"metric_for_best_model": "adap_fu_loss"}, 2),
        ({"metric_for_best_model": "loss"}, 2),
        ({"metric_for_best_model": "eval_adap_fu_token_accuracy"}, 2),
        ({"metric_for_best_model": "eval_adap_fu_loss", "greater_is_better": True}, 1),
    ],
    ids=str,
)
def test_metrics(make_args, settings, best):
    """Without a run: which of the records of `LOSSES` the round loop keeps."""
    selection = choose_selection(make_args(load_best_model_at_end=True, **settings), [""], [])
    loop = RoundLoop(SimpleNamespace(client_lora={}, emulator_lora={}), None, None, None, None, selection=selection)
    for number, loss in enumerate(LOSSES[:4], start=1):
        loop._keep_best(RoundRecord(number, adap_fu_loss=loss, adap_fu_token_accuracy=1 / loss))
    assert loop.best.server_round == best


def test_metric_of_one_of_several_sets(make_runner):
    sets = {"near": sums(0, 8), "far": sums(60, 65)}
    name = "eval_adap_fu_far_loss"
    runner = make_runner(
        eval_dataset=sets, load_best_model_at_end=True, metric_for_best_model=name, num_rounds=4, learning_rate=0.1
    )
    summary = runner.train()
    values = [record.scores()[name] for record in runner.records]
    assert values[summary.best_round - 1] == min(values) == pytest.approx(summary.adap_fu["far_loss"])
    assert runner.state.best_metric == min(values)


def test_not_a_number_is_never_the_best(make_runner, losses):
    runner, _ = watched(make_runner, losses, [float("nan"), 2.0, 3.0])
    assert runner.train().best_round == 2


@pytest.mark.parametrize("stopped_after", [slow(1), 2, slow(4)])
def test_a_resumed_run_has_the_same_best_round(make_runner, losses, tmp_path, stopped_after):
    whole, watch = watched(make_runner, losses, LOSSES[:4], output_dir=str(tmp_path / "whole"), **ALL_PUBLIC_TEXT)
    whole.train()
    settings = {"save_total_limit": 1, **ALL_PUBLIC_TEXT}
    first, _ = watched(make_runner, losses, LOSSES[:4], num_rounds=stopped_after, **settings)
    first.train()
    assert FederationState.load_newest(first.folder.state).best.server_round == min(stopped_after, 2)
    again, watch_again = watched(make_runner, losses, LOSSES[:4], resume_from_checkpoint=True, **settings)
    summary = again.train()
    assert summary.best_round == 2 and again.state.best_global_step == 2 and again.state.best_metric == 2.0
    assert_result_is(again, watch.client[1], watch.emulator[1])
    if watch_again.client:  # the run went on from its last round, not from the best one
        assert same(watch_again.client[-1], watch.client[3])


def test_patience_ends_a_run(make_runner, losses):
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    runner, watch = watched(make_runner, losses, callbacks=[stop])
    summary = runner.train()
    assert summary.rounds == 4 and summary.best_round == 2  # no gain in 3 and 4; round 5 would have been better
    assert_result_is(runner, watch.client[1], watch.emulator[1])


def test_patience_counts_evaluated_rounds(make_runner, losses, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    values = [2.0, 2.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5]
    runner, _ = watched(make_runner, losses, values, callbacks=[stop], eval_rounds=2, log_level="warning")
    assert runner.train().rounds == 6 and runner.state.best_global_step == 4
    assert "did not find" not in caplog.text


@pytest.mark.parametrize("stopped_after", [3, 4])
def test_patience_goes_on_after_a_resume(make_runner, losses, stopped_after):
    first, _ = watched(
        make_runner, losses, num_rounds=stopped_after, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)]
    )
    first.train()
    again, watch = watched(
        make_runner, losses, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], resume_from_checkpoint=True
    )
    assert again.train().rounds == 4 and len(watch.client) == 4 - stopped_after


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eval_dataset": None}, "`load_best_model_at_end` is True, but `eval_dataset` is None"),
        ({"eval_rounds": 0}, "`load_best_model_at_end` is True, but `eval_rounds` is 0"),
        (
            {"metric_for_best_model": "eval_accuracy"},
            "`metric_for_best_model` is 'eval_accuracy', but .* eval_adap_fu_loss,",
        ),
        ({"metric_for_best_model": "exact_match", "eval_metric": "exact_match"}, "is 'eval_exact_match', but"),
        (
            {"load_best_model_at_end": False, "eval_dataset": None, "callbacks": [EarlyStoppingCallback()]},
            "`callbacks` has an EarlyStoppingCallback, but `eval_dataset` is None",
        ),
        (
            {"load_best_model_at_end": False, "eval_rounds": 0, "callbacks": [EarlyStoppingCallback]},
            "`callbacks` has an EarlyStoppingCallback, but `eval_rounds` is 0",
        ),
    ],
    ids=["no text", "never", "unknown", "at the end", "early stopping without text", "early stopping, never"],
)
def test_what_cannot_be_compared_is_refused_at_once(make_runner, monkeypatch, settings, message):
    monkeypatch.setattr("fedbiot_trainer.federation.loading.prepare_tokenizer", None)  # it does not come that far
    with pytest.raises(ValueError, match=message):
        make_runner(**{"load_best_model_at_end": True, **settings})


def test_best_round_of_another_metric_is_another_run(make_runner, losses):
    first, _ = watched(make_runner, losses, LOSSES[:2], num_rounds=1)
    first.train()
    other, _ = watched(
        make_runner, losses, LOSSES[:2], metric_for_best_model="adap_emu_loss", resume_from_checkpoint=True
    )
    with pytest.raises(ValueError, match='metric_for_best_model: null then, "adap_emu_loss" now'):
        other.train()


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Gives what has been said of AdapFu's loss so far."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    return lambda: [record.message for record in caplog.records if "AdapFu's loss" in record.message]


@pytest.fixture
def warned(warnings):
    """Gives what is said of rounds with these losses of AdapFu, `None` where a round was not evaluated. Without a run."""

    def show(values, zero_shot=9.0):
        observer = WarnOfNoGain([], keeps_best_round=True)
        for number, loss in enumerate(values, start=1):
            observer.on_round_end(RoundRecord(number, adap_fu_loss=loss, zero_shot_loss=zero_shot))
        return warnings()

    return show


def test_worse_than_zero_shot_is_said_once(warned):
    [message] = warned([2.0, 2.1, 1.9, 2.0, 2.0], zero_shot=1.5)
    assert message.startswith(
        "AdapFu's loss on held-out text (1.9000) has been worse than the full model's without it (1.5000) for 3 "
        "evaluated rounds in a row."
    )
    for advice in ("`local_steps`", "`learning_rate`", "public text", "`plug_in_scales`"):
        assert advice in message


def test_worse_than_its_best_round_is_said(warned):
    [message] = warned([2.0, 1.0, 1.1, 1.2, 1.1, 1.1])
    assert "(1.1000) has been worse than after round 2 (1.0000) for 3 evaluated rounds in a row" in message


@pytest.mark.parametrize(
    "values",
    [
        [2.0, 1.0, 1.1, 0.9, 1.0, 0.8],
        [2.0, 2.0, 2.0, 2.0],
        [None, 2.1, None, 2.3, 2.4],
    ],
    ids=["gains", "level", "two evaluations after the best"],
)
def test_nothing_is_said_of(warned, values):
    assert warned(values) == []


@pytest.fixture
def warned_by_run(make_runner, losses, warnings):
    """Gives what a run with these losses of AdapFu has said."""

    def run(values, **settings):
        settings = {"num_rounds": len(values), "log_level": "warning", **SHORT, **settings}
        losses(make_runner(**settings), values).train()
        return warnings()

    return run


@pytest.mark.parametrize(
    "keeps, result",
    [
        (None, "The run ends with its best round all the same (`load_best_model_at_end`)."),
        (False, "The run ends with its last round: `load_best_model_at_end=True` would keep the best."),
    ],
)
def test_a_warning_says_which_round_is_the_result(warned_by_run, keeps, result):
    [message] = warned_by_run([1.0, 2.1, 2.2, 2.3], load_best_model_at_end=keeps)
    assert message.endswith(result)


def test_it_counts_across_a_resume(warned_by_run):
    assert warned_by_run([2.0, 2.1, 2.2, 2.3], num_rounds=2) == []
    assert len(warned_by_run([2.0, 2.1, 2.2, 2.3], num_rounds=4, resume_from_checkpoint=True)) == 1
