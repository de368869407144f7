"""What has changed between a run and its resume: the folder, the model, the text, and what is in the files."""

import json
import logging
import shutil

import pytest
import torch
from conftest import save_files, sums, tiny_model
from peft import LoraConfig
from test_resume import numbers_of
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fedbiot_trainer.cli.train import make_parser, prepare
from fedbiot_trainer.evaluation.coverage import EMULATOR_LOSS
from fedbiot_trainer.federation.interruption import RunInterrupted
from fedbiot_trainer.federation.state import FederationState
from fedbiot_trainer.shared.records import RoundRecord


pytestmark = pytest.mark.trains

SHORT = {"num_rounds": 2, "local_steps": 1, "initial_alignment_steps": 1, "alignment_steps": 1}


@pytest.fixture(scope="module")
def one_round(shared_run):
    """A run that can be made longer."""
    return shared_run(**{**SHORT, "num_rounds": 1})


@pytest.fixture
def earlier(one_round, tmp_path):
    """Its copy in the folder that `make_runner` uses."""
    return shutil.copytree(one_round.folder.path, tmp_path / "run")


@pytest.fixture
def go_on(make_runner):
    def train(checkpoint=True, **changes):
        runner = make_runner(**{**SHORT, "resume_from_checkpoint": checkpoint, **changes})
        runner.train()
        return runner

    return train


def states_of(folder):
    return sorted(file.name for file in (folder / "state").iterdir())


# The folder


def test_in_python_the_argument_is_enough(make_runner, earlier):
    runner = make_runner(**SHORT)
    assert runner.train(resume_from_checkpoint=True).rounds == 2


def test_a_command_line_reads_nothing_for_a_folder_of_another_run(tmp_path, monkeypatch):
    (tmp_path / "rounds.jsonl").touch()
    monkeypatch.setattr("fedbiot_trainer.cli.train.load_datasets", lambda *args: pytest.fail("read"))
    flags = ["--task", "demo", "--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"]
    with pytest.raises(ValueError, match="which holds another run"):
        prepare(*make_parser().parse_args_and_config(flags))


def test_a_path_into_the_folder_of_another_run(make_runner, go_on, one_round, tmp_path):
    make_runner(num_rounds=3, local_steps=1, output_dir=str(tmp_path / "other")).train()
    before = states_of(tmp_path / "other"), (tmp_path / "other" / "rounds.jsonl").read_text()
    settings = {"checkpoint": str(one_round.folder.path), "output_dir": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="`output_dir` is '.*other', which holds another run"):
        go_on(**settings)
    assert before == (states_of(tmp_path / "other"), (tmp_path / "other" / "rounds.jsonl").read_text())
    runner = go_on(**settings, overwrite_output_dir=True)
    assert states_of(runner.folder.path) == ["round-000002-0000.safetensors"]
    assert [record["server_round"] for record in numbers_of(runner)] == [1, 2]


def test_back_to_an_earlier_state(make_runner, go_on, tmp_path):
    """The rounds after it are not this run's any more."""
    make_runner(**{**SHORT, "num_rounds": 3, "save_total_limit": 10}).train()
    settings = {"num_rounds": 3, "save_total_limit": 10}
    first = tmp_path / "run" / "state" / "round-000001-0000.safetensors"
    with pytest.raises(ConnectionError):
        go_on(str(first), callbacks=[Fails(2)], **settings)
    assert states_of(tmp_path / "run")[-1] == "round-000002-0000.safetensors"
    runner = go_on(**settings)
    assert [record["server_round"] for record in numbers_of(runner)] == [1, 2, 3]


class Fails(TrainerCallback):
    """In the middle of a round's files."""

    def __init__(self, server_round):
        self.server_round = server_round

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.server_round:
            raise ConnectionError("the power is gone")


# The model


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda: {"model": tiny_model(seed=7)}, "weights: "),
        (lambda: {"model": tiny_model(dtype=torch.bfloat16)}, "weights: "),
        (lambda: {"emulator_peft_config": LoraConfig(r=4, lora_alpha=64)}, "emulator_lora.lora_alpha: 8 then, 64 now"),
        (lambda: {"peft_config": LoraConfig(r=4, lora_alpha=4)}, "client_lora.lora_alpha: 8 then, 4 now"),
    ],
    ids=["weights", "dtype", "emulator LoRA", "client LoRA"],
)
def test_another_model_is_refused(go_on, earlier, changes, message):
    with pytest.raises(ValueError, match=f"(?s)would make it another run:.*{message}"):
        go_on(**changes())


def test_the_same_model_under_another_path(go_on, tmp_path, tokenizer, monkeypatch):
    save_files(tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    go_on(False, model="base", num_rounds=1)
    assert go_on(model=str(tmp_path / "base")).summary.rounds == 2


def test_a_lora_of_another_shape(one_round):
    server = one_round.server
    state = {key: tensor[:1] if "lora_A" in key else tensor for key, tensor in server.client_lora.items()}
    with pytest.raises(ValueError, match=r"lora_A.weight` is \(1, 32\), but the model's is \(4, 32\)"):
        server.client_lora, before = state, server.client_lora
        try:
            server.install_loras()
        finally:
            server.client_lora = before


# The held-out text


def test_another_held_out_text(go_on, earlier, caplog, monkeypatch):
    """Its scores are not compared with those on the first one."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    state = FederationState.load_newest(earlier / "state")
    assert state.best.server_round == 1
    patience = Counts()
    runner = go_on(eval_dataset=sums(30, 33), callbacks=[patience], log_level="warning")
    assert "`eval_dataset` is another than before" in caplog.text
    runner.evaluator.forget()
    assert runner.summary.zero_shot == runner.evaluator.zero_shot(generate=True) != state.zero_shot
    assert runner.summary.best_round == 2
    assert (patience.steps, patience.evaluations) == (2, 1)


def test_the_same_held_out_text(go_on, earlier):
    runner = go_on()
    assert runner.summary.zero_shot["loss"] == FederationState.load_newest(earlier / "state").zero_shot["loss"]


def test_a_best_round_that_is_not_asked_for_any_more(go_on, earlier):
    before = FederationState.load_newest(earlier / "state").best.client_lora
    runner = go_on(eval_rounds=0)
    assert runner.summary.best_round is None
    assert not any(torch.equal(t, runner.server.client_lora[k]) for k, t in before.items() if "lora_B" in k)
    assert FederationState.load_newest(earlier / "state").best is None


# What a run goes on with


class Counts(TrainerCallback, ExportableState):
    """Keeps a state."""

    def __init__(self):
        self.steps = self.evaluations = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1

    def state(self):
        return {"args": {}, "attributes": vars(self)}


def test_callbacks_that_keep_a_state(go_on, earlier):
    counts = Counts()
    go_on(callbacks=[counts])
    assert (counts.steps, counts.evaluations) == (2, 2)


def test_interrupted_while_public_text_is_measured(make_runner, go_on, monkeypatch):
    runner = make_runner(**SHORT)

    def interrupt():
        raise RunInterrupted(15)

    monkeypatch.setattr(runner.public_loss, "measure", interrupt)
    with pytest.raises(RunInterrupted):
        runner.train()
    steps = []
    again = make_runner(**SHORT, resume_from_checkpoint=True)
    align = again.server.align
    monkeypatch.setattr(again.server, "align", lambda number: steps.append(number) or align(number))
    again.train()
    assert again.summary.initial_alignment[EMULATOR_LOSS] > 0
    assert steps == [1, 1]  # the rounds': the initial alignment was not lost


def test_a_runner_that_was_stopped_is_not_used_again(make_runner, monkeypatch):
    runner = make_runner(**SHORT)
    runner.interruption.received = 2
    with pytest.raises(RunInterrupted):
        runner.train()
    with pytest.raises(ValueError, match="This runner has trained 0 rounds, or begun to. Make another one to go on"):
        runner.train(resume_from_checkpoint=True)


def test_examples_of_clients_elsewhere(one_round):
    state = FederationState.load_newest(one_round.folder.state)
    assert state.num_examples == one_round.server.num_examples == {"north": 24, "south": 12}


# The files


def test_a_record_that_was_cut_off(go_on, earlier):
    file = earlier / "rounds.jsonl"
    file.write_text(file.read_text()[:-40])
    runner = go_on()
    assert [record["server_round"] for record in numbers_of(runner)] == [1, 2]


def test_a_state_keeps_the_order_of_its_tensors(one_round):
    """A sum over them is the same then."""
    state = FederationState.load_newest(one_round.folder.state)
    assert list(state.client_lora) == list(one_round.server.client_lora) != sorted(state.client_lora)


def test_a_state_of_another_version(earlier, monkeypatch):
    [file] = (earlier / "state").glob("round-000001*")
    monkeypatch.setattr("fedbiot_trainer.federation.state._put_back", lambda values, tensors: values | {"new": 1})
    with pytest.raises(ValueError, match="has other fields than this library's .*new"):
        FederationState.load(file)


def test_records_without_scores():
    record = RoundRecord(1, zero_shot_loss=2.0, adap_fu_loss=1.0, evaluations={"adap_fu": {"a_loss": 1.0}}, bytes_up=3)
    assert record.scores() and record.without_scores() == RoundRecord(1, bytes_up=3)
    assert json.loads(record.to_json())["adap_fu_loss"] == 1.0
