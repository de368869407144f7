import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALL_PUBLIC_TEXT, assert_same, slow, sums
from transformers import TrainerCallback

from fedbiot_trainer.federation.interruption import RunInterrupted
from fedbiot_trainer.federation.resume import find_state
from fedbiot_trainer.federation.state import FederationState
from fedbiot_trainer.output.run_folder import RunFolder


pytestmark = pytest.mark.trains


HERE = Path(__file__).parent
SETTINGS = {"num_rounds": 3, "lr_scheduler_type": "linear", "alignment_lr_scheduler_type": "linear"}


class StopAfter(TrainerCallback):
    """Ends a run as a crash would, in the middle of a round's files."""

    def __init__(self, server_round):
        self.server_round = server_round

    def on_save(self, args, state, control, **kwargs):
        self.folder = args.output_dir
        if state.global_step == self.server_round:
            raise ConnectionError("the power is gone")


def numbers_of(runner):
    records = [json.loads(line) for line in runner.folder.rounds.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_run(one, other):
    for name in ("client_lora", "emulator_lora"):
        a, b = getattr(one.server, name), getattr(other.server, name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert numbers_of(one) == numbers_of(other)
    for name in ("zero_shot", "adap_emu", "adap_fu", "rounds", "bytes", "initial_alignment"):
        values = (getattr(runner.summary, name) for runner in (one, other))
        a, b = ({k: v for k, v in x.items() if "seconds" not in k} if isinstance(x, dict) else x for x in values)
        assert a == b, name


@pytest.fixture(scope="module")
def whole(shared_run):
    """The run that nothing has stopped."""
    return shared_run(**SETTINGS)


@pytest.fixture(scope="module")
def after_crash(shared_run):
    """Gives the folder of a run that crashed in a round."""

    @functools.cache
    def folder(server_round):
        stop = StopAfter(server_round)
        with pytest.raises(ConnectionError):
            shared_run(callbacks=[stop], **SETTINGS)
        return stop.folder

    return folder


@pytest.fixture
def crash(after_crash, tmp_path):
    """Have a run crash in a round in the folder that `make_runner` uses. In truth a copy of the one that did."""
    return lambda server_round: shutil.copytree(after_crash(server_round), tmp_path / "run")


def resumed(make_runner, checkpoint=True, **changes):
    runner = make_runner(**{**SETTINGS, **changes, "resume_from_checkpoint": checkpoint})
    runner.train()
    return runner


@pytest.mark.parametrize("server_round", [slow(1), 2, slow(3)])
def test_a_resumed_run_ends_with_the_same_bits(make_runner, crash, whole, server_round):
    crash(server_round)
    assert_same_run(resumed(make_runner), whole)


def test_a_finished_run_can_be_resumed(make_runner, whole, tmp_path):
    shutil.copytree(whole.folder.path, tmp_path / "run")
    assert_same_run(resumed(make_runner), whole)


def test_a_round_goes_on_after_its_first_client(make_runner, whole, monkeypatch):
    """With a state after each client, those that answered are not asked again."""
    runner = make_runner(save_after_clients=True, **SETTINGS)
    fit = runner.clients["south"].fit

    def fail_in_round_2(start):
        if runner.trackers.state.global_step == 1:
            raise KeyboardInterrupt
        return fit(start)

    monkeypatch.setattr(runner.clients["south"], "fit", fail_in_round_2)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    again = make_runner(save_after_clients=True, resume_from_checkpoint=True, **SETTINGS)
    rounds = []
    fit_north = again.clients["north"].fit
    monkeypatch.setattr(again.clients["north"], "fit", lambda start: rounds.append(1) or fit_north(start))
    again.train()
    assert len(rounds) == 1  # round 3
    assert_same_run(again, whole)


def test_signal_in_a_client_ends_the_step_and_keeps_the_answers(make_runner, whole, monkeypatch):
    runner = make_runner(**SETTINGS)
    fit = runner.clients["south"].fit

    def told_to_stop(start):
        if runner.trackers.state.global_step == 1:
            os.kill(os.getpid(), 15)
        return fit(start)

    monkeypatch.setattr(runner.clients["south"], "fit", told_to_stop)
    with pytest.raises(RunInterrupted, match="stopped by SIGTERM") as raised:
        runner.train()
    assert raised.value.signal == 15
    state = FederationState.load_newest(runner.folder.state)
    assert state.server_round == 1 and list(state.open_round.client_losses) == ["north"]
    assert_same_run(resumed(make_runner), whole)


def test_signal_while_evaluating(make_runner, whole, monkeypatch):
    """The round is averaged by then, and must not be averaged again."""
    runner = make_runner(**SETTINGS)
    adapted = runner.evaluator.adapted

    def told_to_stop(*args):
        if runner.trackers.state.global_step == 1:
            os.kill(os.getpid(), 2)
        return adapted(*args)

    monkeypatch.setattr(runner.evaluator, "adapted", told_to_stop)
    with pytest.raises(RunInterrupted, match="stopped by SIGINT"):
        runner.train()
    state = FederationState.load_newest(runner.folder.state)
    assert state.open_round.server_round == 2 and state.open_round.counted
    assert_same_run(resumed(make_runner), whole)


def test_more_rounds(make_runner, tmp_path):
    """With constant schedules, a finished run goes on as if it had been longer from the start."""
    long = make_runner(output_dir=str(tmp_path / "long"), num_rounds=2, **ALL_PUBLIC_TEXT)
    long.train()
    make_runner(num_rounds=1, **ALL_PUBLIC_TEXT).train()
    more = make_runner(num_rounds=2, resume_from_checkpoint=True, logging_steps=3, **ALL_PUBLIC_TEXT)
    more.train()
    for key, tensor in long.server.client_lora.items():
        assert torch.equal(more.server.client_lora[key], tensor)
    losses = [[record["adap_fu_loss"] for record in numbers_of(runner)] for runner in (more, long)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_damaged_state_is_noticed(make_runner, crash, whole, caplog, monkeypatch):
    newest = sorted((crash(2) / "state").glob("round-*"))[-1]
    content = bytearray(newest.read_bytes())
    content[-5] ^= 255
    newest.write_bytes(content)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    again = resumed(make_runner, log_level="warning")
    assert "is damaged: its digest does not match its content. The one before it is used." in caplog.text
    assert_same_run(again, whole)


def test_a_record_is_never_there_without_its_state(make_runner, whole, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if self.name == "round-000002-0000.part":
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    runner = make_runner(**SETTINGS)
    with pytest.raises(OSError, match="no space left"):
        runner.train()
    assert [record["server_round"] for record in numbers_of(runner)] == [1]
    monkeypatch.undo()
    assert_same_run(resumed(make_runner), whole)


def test_the_newest_states_are_kept(make_runner):
    short = {"client_datasets": {"north": sums(0, 4)}, "local_steps": 1, "eval_dataset": None}
    runner = make_runner(num_rounds=5, save_total_limit=3, **short)
    runner.train()
    assert [file.name for file in sorted(runner.folder.state.iterdir())] == [
        f"round-{i:06}-0000.safetensors" for i in (3, 4, 5)
    ]


def test_clients_join_and_leave(make_runner, crash):
    crash(2)  # of north and south
    again = resumed(make_runner, client_datasets={"north": sums(0, 8), "west": sums(12, 14)})
    records = numbers_of(again)
    assert [list(record["weights"]) for record in records] == [["north", "south"]] * 2 + [["north", "west"]]
    assert records[2]["weights"] == {"north": 24 / 30, "west": 6 / 30}
    assert again.server.client_steps == {"north": 9, "south": 6, "west": 3}


def test_a_path_of_another_folder(make_runner, after_crash, whole):
    """Or of its states, or of one of them, which give the state that the folder gives."""
    crashed = Path(after_crash(2))
    again = resumed(make_runner, str(crashed))
    assert again.summary.rounds == 3
    assert_same_run(again, whole)
    expected = find_state(again.folder, str(crashed))
    assert [record.server_round for record in expected.records] == [1, 2]
    for path in (crashed / "state", crashed / "state" / "round-000002-0000.safetensors"):
        state = find_state(again.folder, str(path))
        for name in ("client_lora", "emulator_lora"):
            assert_same(getattr(state, name), getattr(expected, name))
        for name in ("server_round", "alignment_steps", "client_steps", "records", "open_round", "settings"):
            assert getattr(state, name) == getattr(expected, name), (path, name)


def test_a_run_without_a_state_yet_starts(make_runner, whole, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    runner = resumed(make_runner, log_level="warning")
    assert "the run starts from the beginning" in caplog.text
    assert_same_run(runner, whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 2e-2}, r"would make it another run:\n  learning_rate: 0.01 then, 0.02 now"),
        ({"emulator_drop_ratio": 0.2}, "emulator_drop_ratio: 0.5 then, 0.2 now"),
        ({"public_dataset": sums(60, 70)}, "public_text: "),
        ({"num_rounds": 6}, "num_rounds: 3 then, 6 now.*More rounds need constant"),
        ({"num_rounds": 1}, "`num_rounds` is 1, but the state is after round 2"),
        ({"per_device_train_batch_size": 2}, "train_batch: 4 then, 2 now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused(make_runner, crash, changes, message):
    crash(2)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        resumed(make_runner, **changes)


def test_same_batches_cut_otherwise_are_the_same_run(make_runner, crash):
    crash(2)
    again = resumed(make_runner, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert again.summary.rounds == 3


def test_nothing_to_resume_from(make_runner, whole, tmp_path):
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is '.*nowhere', but there is no state of a run"):
        resumed(make_runner, str(tmp_path / "nowhere"))
    shutil.copytree(whole.folder.path, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "state")
    with pytest.raises(ValueError, match="holds the results of a run without its state"):
        resumed(make_runner, output_dir=str(tmp_path / "old"))


def test_every_state_is_damaged(make_runner, crash):
    for file in (crash(2) / "state").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(ValueError, match="every state in '.*' is damaged"):
        resumed(make_runner)


def test_two_runs_on_one_folder(make_args, make_runner):
    other, runner = RunFolder(make_args(), None), make_runner(num_rounds=1, local_steps=1)
    other.claim()
    with pytest.raises(ValueError, match="in which another run is going on"):
        runner.train()
    other.release()
    runner.train()


def test_what_came_meanwhile_is_not_deleted(make_runner, whole, tmp_path):
    late = make_runner()
    shutil.copytree(whole.folder.path, tmp_path / "run", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds another run"):
        late.train()
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--kills", "10", "--seed", "1"], id="one process"),
        pytest.param(["--kills", "10", "--save_after_clients"], id="after each client"),
        pytest.param(["--kills", "10", "--processes", "2"], id="two processes"),
    ],
)
def test_killed_at_any_moment(tmp_path, flags):
    """SIGKILL in the hidden states, the alignment, a client, while saving, while evaluating."""
    result = subprocess.run(
        [sys.executable, HERE / "kill_run.py", "--folder", tmp_path, *flags],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found["killed"]) == int(flags[1]), found
    assert found["loras"] and found["records"] and found["scores"], found


def test_resume_in_mixed_precision(make_runner, tmp_path):
    """Who trains first in a process computes as who trains later."""

    def run(folder, num_rounds, **settings):
        settings |= {"bf16": True, "lr_scheduler_type": "constant", "alignment_lr_scheduler_type": "constant"}
        runner = make_runner(
            output_dir=str(tmp_path / folder), num_rounds=num_rounds, load_best_model_at_end=False, **settings
        )
        runner.train()
        return runner.server.client_lora

    whole = run("whole", 3)
    run("cut", 1)
    resumed = run("cut", 3, resume_from_checkpoint="true")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
