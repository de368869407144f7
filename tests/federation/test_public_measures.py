"""What a run measures on public text: how far the emulator is there, and whether it covers the clients' text."""

import json

import pytest
import torch
from conftest import rounds_of, sums
from datasets import Dataset

from fedbiot_trainer import ClientUpdate
from fedbiot_trainer.evaluation import coverage
from fedbiot_trainer.evaluation.coverage import why_uncovered
from fedbiot_trainer.shared.records import RunSummary


pytestmark = pytest.mark.trains
PUBLIC = {"public_emulator_loss": 2.0, "public_full_loss": 1.25}
DRIFTS = [f"drift_{of}{where}{term}" for of in ("", "public_") for where in ("", "label_") for term in ("l2", "kl")]


@pytest.fixture
def everything_uncovered(monkeypatch):
    monkeypatch.setattr(coverage, "COVERAGE_MARGIN", -100.0)


# ---- drift


def test_drift_on_both_texts(make_runner):
    runner = make_runner(eval_drift=True, public_eval_size=6, num_rounds=1)
    assert len(runner.server.trainer.train_dataset) == 24
    runner.train()
    for record in rounds_of(runner):
        assert all(record[name] > 0 for name in DRIFTS)
        assert len({record[name] for name in DRIFTS}) == len(DRIFTS)


def test_drift_at_labels_is_part_of_all(make_runner):
    """Of text alone, all tokens but the last predict one with a label. Of completions, few do."""
    text = Dataset.from_dict({"text": ["a" * 12] * 4})
    data = {"client_datasets": {"a": text}, "public_dataset": text, "eval_dataset": text}
    runner = make_runner(**data, eval_drift=True)
    runner.server.install_loras()
    found = runner.drift.measure()
    assert sorted(found) == sorted(name for name in DRIFTS if "public" not in name)
    rows = runner.drift.texts["drift"]
    assert rows[0]["labels"] == rows[0]["input_ids"] and len(rows[0]["input_ids"]) == 13
    one_text = rows.select([0]).map(lambda row: {"labels": [-100] * 12 + row["labels"][12:]})
    runner.drift.texts = {"last": one_text, "all": rows}
    found = runner.drift.measure()
    assert found["last_l2"] == pytest.approx(found["all_l2"]) and found["last_label_l2"] != found["all_label_l2"]
    # The mean over 13 tokens is that of the 12 before the last and the last itself, which only `all_l2` counts.
    last = 13 * found["all_l2"] - 12 * found["all_label_l2"]
    assert 0 < last < 13 * found["all_l2"]


def test_public_drift_needs_no_private_text(make_runner):
    runner = make_runner(eval_drift=True, public_eval_size=6, eval_dataset=None, num_rounds=1)
    runner.train()
    for record in rounds_of(runner):
        assert record["drift_public_kl"] > 0 and record["drift_kl"] is None and record["adap_fu_loss"] is None


def test_public_eval_size_must_leave_something(make_runner):
    with pytest.raises(ValueError, match="`public_eval_size` is 30, but `public_dataset` has 30 examples"):
        make_runner(public_eval_size=30)
    with pytest.raises(ValueError, match="`public_eval_size` is -1, but it cannot be negative. 0 turns it off"):
        make_runner(public_eval_size=-1)


# ---- coverage


@pytest.mark.parametrize(
    "client, public, held_out, says",
    [
        (4.5, PUBLIC, None, "4.5 before any training, 2 on the public text, where the full model's is 1.25"),
        (3.9, PUBLIC, None, None),
        (1.0, PUBLIC, None, None),
        (9.0, {}, None, None),
        (4.5, PUBLIC, 1.0, "where the full model's is 1.25, and 1 on held-out text"),
        (4.5, PUBLIC, 2.6, None),  # the task is new to the full model, too
        (9.0, {}, 1.0, None),
    ],
)
def test_rule(client, public, held_out, says):
    why = why_uncovered(client, public, held_out)
    assert why is None if says is None else why.endswith(says)


def test_each_client_is_told_once(make_runner, everything_uncovered, capsys):
    runner = make_runner(num_rounds=2, local_steps=1)
    runner.train()
    first, *others = rounds_of(runner)
    assert list(first["client_zero_shot_losses"]) == list(first["uncovered"]) == ["north", "south"]
    assert all(record["client_zero_shot_losses"] == record["uncovered"] == {} for record in others)
    out = capsys.readouterr().out
    assert out.count("the public text does not cover client 'north': the emulator's loss on it is") == 1
    assert out.count("Align on public text in their form") == 1
    assert "the public text does not cover: north, south" in out
    assert "loss on public text | emulator " in out
    summary = RunSummary.read(runner.folder.path / "summary.json")
    assert summary.uncovered == first["uncovered"]
    assert summary.client_zero_shot_losses == first["client_zero_shot_losses"]
    assert summary.initial_alignment.keys() >= PUBLIC.keys()


def test_number_is_the_emulators_loss(make_runner):
    """In whatever round the client takes part first, and whatever the client LoRA is by then."""
    data = {f"c{i}": sums(i, i + 3) for i in range(4)}
    runner = make_runner(
        client_datasets=data,
        fraction_train=0.5,
        num_rounds=6,
        local_steps=1,
        alignment_steps=0,
        eval_dataset=sums(1, 4),
    )
    runner.train()
    by_client = {}
    for record in rounds_of(runner):
        assert not by_client.keys() & record["client_zero_shot_losses"].keys()
        by_client |= record["client_zero_shot_losses"]
    assert sorted(by_client) == sorted(data)
    server = runner.server
    server.client_lora = {key: torch.zeros_like(tensor) for key, tensor in server.client_lora.items()}
    server.install_loras()
    assert by_client["c1"] == pytest.approx(runner.evaluator.adapted()["adap_emu"]["loss"])
    assert len(set(by_client.values())) == 4


def test_nothing_is_trained_otherwise(make_runner, tmp_path):
    one, two = (
        make_runner(output_dir=str(tmp_path / str(number)), client_zero_shot_examples=number) for number in (0, 100)
    )
    one.train(), two.train()
    for mine, others in zip(rounds_of(one), rounds_of(two), strict=True):
        assert mine["client_zero_shot_losses"] == {}
        for name in ("client_losses", "adap_fu_loss", "alignment_l2"):
            assert mine[name] == others[name]
    assert "public_emulator_loss" not in one.summary.initial_alignment


@pytest.mark.parametrize("number", [0, 3])
def test_what_leaves_the_client(make_runner, number):
    runner = make_runner(client_zero_shot_examples=number)
    starts = runner.server.start_round(1, ["north"])
    reply = runner.clients["north"].fit(starts["north"])
    update = ClientUpdate.from_bytes(reply, client_lora=runner.server.client_lora)
    assert set(update.metrics) == {"loss", "proximal_term"} | ({"zero_shot_loss"} if number else set())


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_text_is_measured_text_by_text(make_runner, tmp_path, strategy):
    settings = {"num_rounds": 1, "alignment_steps": 0, "max_length": 32}
    packed = make_runner(packing=True, packing_strategy=strategy, output_dir=str(tmp_path / "packed"), **settings)
    packed.train()
    [record] = rounds_of(packed)
    loss = record["client_zero_shot_losses"]["north"]
    assert loss > 0
    if strategy == "bfd":
        plain = make_runner(output_dir=str(tmp_path / "plain"), **settings)
        plain.train()
        [record] = rounds_of(plain)
        assert loss == pytest.approx(record["client_zero_shot_losses"]["north"])


def test_after_a_resume(make_runner, everything_uncovered, monkeypatch):
    runner = make_runner(save_after_clients=True)

    def stop(start):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.clients["south"], "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    again = make_runner(save_after_clients=True, resume_from_checkpoint=True)
    again.train()
    found = [record["uncovered"] for record in rounds_of(again)]
    assert list(again.summary.uncovered) == ["north", "south"]
    assert sum(map(len, found)) == 2
    assert again.summary.initial_alignment.keys() >= PUBLIC.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_adapter_layers": -1, "emulator_drop_ratio": 0.0, "initial_alignment_steps": 0, "alignment_steps": 0},
        {"emulator_drop_ratio": 0.0},
        {"initial_alignment_steps": 0, "alignment_steps": 0},
    ],
    ids=["no emulator", "nothing dropped", "no alignment"],
)
def test_without_alignment_nothing_is_said(make_runner, everything_uncovered, settings):
    runner = make_runner(num_rounds=1, **settings)
    runner.train()
    assert runner.summary.uncovered == {}
    assert "public_emulator_loss" not in runner.summary.initial_alignment
    assert bool(runner.summary.client_zero_shot_losses) == ("num_adapter_layers" not in settings)


def test_public_text_without_a_label(make_runner):
    """Prompts that fill `max_length` are aligned on, but there is nothing to compare with."""
    long = Dataset.from_dict({"prompt": ["a" * 40] * 8, "completion": ["b"] * 8})
    runner = make_runner(public_dataset=long, max_length=16, num_rounds=1)
    summary = runner.train()
    assert summary.uncovered == {} and summary.client_zero_shot_losses
    assert "public_full_loss" not in json.dumps(summary.initial_alignment)
