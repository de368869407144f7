"""Clients that fail, are late, or are not there."""

import time

import pytest
import torch
from conftest import rounds_of, sums

from fedbiot_trainer.federation.participation import Participation


DATA = {f"c{i}": sums(2 * i, 2 * i + 3) for i in range(4)}


def failing(client, times):
    """Let a client's next `times` calls fail."""
    fit, left = client.fit, [times]

    def answer(start):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("no disk")
        return fit(start)

    client.fit = answer


def test_a_client_that_fails_is_left_out_of_its_round(make_runner):
    runner = make_runner(client_datasets=DATA, num_rounds=3)
    failing(runner.clients["c1"], 1)
    runner.train()
    records = rounds_of(runner)
    assert records[0]["failed"] == {"c1": "OSError: no disk"}
    assert [list(record["weights"]) for record in records] == [["c0", "c2", "c3"], [*DATA], [*DATA]]
    assert records[0]["weights"] == dict.fromkeys(("c0", "c2", "c3"), pytest.approx(1 / 3))
    assert runner.server.client_steps == {"c0": 9, "c1": 6, "c2": 9, "c3": 9}


def test_a_client_that_fails_in_the_middle_of_its_training(make_runner, monkeypatch, tmp_path):
    """What it leaves in the shared trainer changes nothing for the others."""
    expected = make_runner(client_datasets=DATA, output_dir=str(tmp_path / "expected"))
    failing(expected.clients["c1"], 2)
    expected.train()
    runner = make_runner(client_datasets=DATA)
    step = runner.trainer.training_step

    def fail(*args, **kwargs):
        if (
            runner.trainer.train_dataset is runner.clients["c1"].train_dataset
            and runner.trainer.state.global_step == 1
        ):
            raise MemoryError("out of memory")
        return step(*args, **kwargs)

    monkeypatch.setattr(runner.trainer, "training_step", fail)
    runner.train()
    assert [record["failed"] for record in rounds_of(runner)] == [{"c1": "MemoryError: out of memory"}] * 2
    for key, tensor in expected.server.client_lora.items():
        assert torch.equal(tensor, runner.server.client_lora[key])


def test_retries(make_runner, tmp_path):
    plain = make_runner(client_datasets=DATA, output_dir=str(tmp_path / "plain"))
    plain.train()
    runner = make_runner(client_datasets=DATA, client_retries=2)
    failing(runner.clients["c1"], 2)
    runner.train()
    assert [record["failed"] for record in rounds_of(runner)] == [{}, {}]
    for key, tensor in plain.server.client_lora.items():
        assert torch.equal(tensor, runner.server.client_lora[key])


def test_too_few_answers_leave_the_lora_as_it_is(make_runner):
    runner = make_runner(client_datasets=DATA, num_rounds=2, min_train_clients=3, load_best_model_at_end=False)
    for name in ("c0", "c1"):
        failing(runner.clients[name], 1)
    before = {key: tensor.clone() for key, tensor in runner.server.client_lora.items()}
    seen = []
    aggregate = runner.server.aggregate
    runner.server.aggregate = lambda: seen.append(1) or aggregate()
    runner.train()
    records = rounds_of(runner)
    assert [record["counted"] for record in records] == [False, True] and len(seen) == 1
    assert records[0]["weights"] == {} and list(records[0]["client_losses"]) == ["c2", "c3"]
    assert any(not torch.equal(before[key], tensor) for key, tensor in runner.server.client_lora.items())
    assert runner.server.client_steps == dict.fromkeys(DATA, 3)


def test_a_client_that_is_late(make_runner, monkeypatch):
    runner = make_runner(client_datasets=DATA, client_timeout=0.5, num_rounds=2)
    step = runner.trainer.training_step

    def slow(*args, **kwargs):
        if runner.trainer.train_dataset is runner.clients["c2"].train_dataset:
            time.sleep(0.6)
        return step(*args, **kwargs)

    monkeypatch.setattr(runner.trainer, "training_step", slow)
    runner.train()
    for record in rounds_of(runner):
        assert record["failed"]["c2"] == "TimeoutError: it took longer than `client_timeout` (0.5 s)"


def test_fewest_clients_are_drawn(make_args):
    args = make_args(fraction_train=0.1, min_train_clients=3)
    names = [f"c{i}" for i in range(10)]
    for server_round in range(20):
        assert len(Participation(args, 0).draw(names, server_round)) == 3
    assert Participation(args, 0).draw(["a", "b"], 1) == ["a", "b"]


def test_more_clients_wanted_than_there_are(make_runner):
    with pytest.raises(ValueError, match="`min_train_clients` is 5, but there are 4 clients"):
        make_runner(client_datasets=DATA, min_train_clients=5)
