import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINTING, HALF_THE_DIGITS, assert_same, rounds_of, save_files, slow, sums, tiny_model
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback, pipeline
from trl import SFTConfig, SFTTrainer

from fedbiot_trainer import ClientUpdate, FedBiOTConfig, FederatedRunner, PayloadError, RoundStart
from fedbiot_trainer.shared.lora_state import get_lora_state, set_lora_state
from fedbiot_trainer.wire.messages import LocalWork


pytestmark = pytest.mark.trains


WORDS = Dataset.from_dict({"prompt": ["a="], "completion": ["b"]})


def numbers_of(runner):
    """Everything in the rounds but what differs from run to run."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in rounds_of(runner)]


@pytest.fixture(scope="module")
def plain(shared_run):
    """The run of `make_runner()`, for what must not make it another one."""
    return shared_run()


# ---- a run, whole


@pytest.fixture(scope="module")
def run(tmp_path_factory, request):
    """One run from a model on disk, for the tests that only look."""
    tokenizer = request.getfixturevalue("tokenizer")
    folder = tmp_path_factory.mktemp("run")
    save_files(folder, tokenizer)
    args = FedBiOTConfig(
        str(folder / "out"), num_rounds=3, local_steps=4, initial_alignment_steps=5, alignment_steps=2,
        per_device_train_batch_size=4, learning_rate=1e-2, eval_metric="exact_match", report_to="tensorboard", use_cpu=True,
    )  # fmt: skip
    runner = FederatedRunner(
        str(folder / "base"), args, {"north": sums(0, 8), "south": sums(8, 12)}, public_dataset=sums(40, 50),
        eval_dataset=sums(6, 10), peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    runner.train()
    return runner


def test_rounds_file(run):
    records = rounds_of(run)
    assert [record["server_round"] for record in records] == [1, 2, 3]
    for record in records:
        assert list(record["client_losses"]) == ["north", "south"]
        assert record["refused"] == {}
        numbers = ("zero_shot_loss", "adap_emu_loss", "adap_fu_loss", "alignment_l2", "alignment_kl")
        assert all(record[name] > 0 for name in numbers)
        assert set(record["seconds"]) == {"align", "broadcast", "local_training", "aggregate", "evaluate"}
    assert records[-1]["adap_fu_loss"] < records[0]["adap_fu_loss"] < records[0]["zero_shot_loss"]


def test_bytes_are_those_of_the_payloads(run):
    starts = run.server.start_round(3, ["north", "south"])
    sizes = [len(starts[name]) for name in starts]
    assert sizes == [starts.size(name) for name in starts]
    assert rounds_of(run)[2]["bytes_down"] == pytest.approx(sum(sizes), abs=8)  # digits of numbers
    assert 0 < rounds_of(run)[2]["bytes_up"] < rounds_of(run)[2]["bytes_down"]


def test_summary(run):
    summary = json.loads((run.folder.path / "summary.json").read_text())
    for name in ("zero_shot", "adap_emu", "adap_fu"):
        assert set(summary[name]) == {"loss", "token_accuracy", "exact_match"}
    parameters = summary["parameters"]
    assert parameters["full"] == tiny_model().num_parameters()
    plain = AutoModelForCausalLM.from_pretrained(run.folder.path / "emulator_package")
    assert parameters["adap_emu"] == plain.num_parameters()
    assert parameters["client_share"] == parameters["adap_emu"] / parameters["full"]
    client = get_lora_state(run.server.models.adap_emu, "client")
    assert parameters["trainable_client"] == sum(tensor.numel() for tensor in client.values())
    assert summary["settings"]["emulator_drop_ratio"] == 0.5
    assert summary["versions"]["torch"]
    assert summary["split"]["dropped"] == [1, 2, 4]
    assert summary["adap_fu"]["loss"] == pytest.approx(rounds_of(run)[-1]["adap_fu_loss"])


def test_figure_and_trackers(run):
    assert (run.folder.path / "rounds.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [log] = (run.folder.path / "runs").iterdir()
    events = EventAccumulator(str(log)).Reload()
    values = [event.value for event in events.Scalars("eval/adap_fu_loss")]
    assert values == pytest.approx([record["adap_fu_loss"] for record in rounds_of(run)])
    assert [event.step for event in events.Scalars("train/client_loss/north")] == [1, 2, 3]
    [score] = events.Scalars("eval/adap_fu_exact_match")
    assert score.step == 3 and score.value == pytest.approx(run.summary.adap_fu["exact_match"])
    terms = [event.value for event in events.Scalars("train/proximal_term/south")]
    assert terms == pytest.approx([record["proximal_terms"]["south"] for record in rounds_of(run)])


def test_result_loads_without_this_package(run, tmp_path):
    """The result is AdapFu for plain transformers + peft: plugged in, merged and in a pipeline."""
    run.server.install_loras()
    inputs = torch.arange(3, 13)[None]
    torch.save(run.server.models.adap_fu(inputs).logits, tmp_path / "expected.pt")
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
base, result = {str(run.folder.model_name)!r}, {str(run.folder.path / "client_lora")!r}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result)
expected, inputs = torch.load({str(tmp_path / "expected.pt")!r}), torch.arange(3, 13)[None]
assert torch.allclose(model(inputs).logits, expected, atol=1e-5)
merged = model.merge_and_unload()
assert torch.allclose(merged(inputs).logits, expected, atol=1e-4)
generator = pipeline("text-generation", merged, tokenizer=AutoTokenizer.from_pretrained(base))
assert generator("50+1=", max_new_tokens=4)[0]["generated_text"].startswith("50+1=")
assert "fedbiot_trainer" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_model_card(run):
    card = (run.folder.path / "client_lora" / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"{run.summary.adap_fu['loss']:.4f}" in card
    assert not re.search(r"\bNone\b(?! of them)", card)
    assert 'from_pretrained("path/to/base")' in card
    assert str(run.folder.path) not in card


def test_package_with_its_loras_is_adap_emu(run, tokenizer):
    package = run.folder.path / "emulator_package"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(package), package / "client_lora", adapter_name="client"
    )
    model.load_adapter(package / "emulator_lora", adapter_name="emulator")
    model.base_model.set_adapter(["client", "emulator"])
    run.server.install_loras()
    inputs = torch.arange(3, 13)[None]
    expected = run.server.models.adap_emu.eval()(inputs).logits
    assert torch.allclose(model.eval()(inputs).logits, expected, atol=1e-5)
    assert pipeline("text-generation", model.get_base_model(), tokenizer=tokenizer)("5+1=", max_new_tokens=2)


def test_the_result_in_a_folder_of_its_own(run, tmp_path):
    run.save_model(str(run.folder.path))  # as TRL's scripts say it
    assert not (run.folder.path / "adapter_model.safetensors").exists()
    run.save_model(tmp_path / "mine")
    names = {file.name for file in run.folder.client_lora.iterdir()}
    assert {file.name for file in (tmp_path / "mine").iterdir()} == names and "adapter_model.safetensors" in names
    for name in names:
        assert (tmp_path / "mine" / name).read_bytes() == (run.folder.client_lora / name).read_bytes()


def test_evaluate_again(run):
    again = run.evaluate()
    for name, metrics in again.items():
        assert metrics == pytest.approx(getattr(run.summary, name))


# ---- invariants


def test_nothing_dropped_makes_adap_emu_equal_adap_fu(make_runner):
    runner = make_runner(emulator_drop_ratio=0.0)
    runner.train()
    for record in rounds_of(runner):
        assert record["adap_emu_loss"] == record["adap_fu_loss"]
    assert runner.summary.adap_emu == runner.summary.adap_fu
    assert runner.summary.adap_fu["loss"] < runner.summary.zero_shot["loss"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", slow("qwen2")])
def test_frozen_tensors_are_bit_identical(make_runner, model_type, dtype, tied):
    model = tiny_model(model_type, dtype=dtype, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner = make_runner(model=model, num_rounds=1)
    client = runner.server.client_lora
    runner.train()
    assert_same(model.state_dict(), before)
    full = {tensor.data_ptr() for tensor in model.state_dict().values()}
    emulator = runner.server.models.package_model.state_dict()
    assert {tensor.data_ptr() for tensor in emulator.values()} < full
    assert any(not torch.equal(client[key], tensor) for key, tensor in runner.server.client_lora.items())


def test_one_client_in_one_round_is_plain_sft(make_runner, tokenizer, tmp_path):
    """No proximal term, no alignment, nothing dropped: the round trip through server and payloads adds nothing."""
    runner = make_runner(
        tiny_model(dtype=torch.float64), client_datasets={"only": sums(0, 8)}, num_rounds=1, local_steps=8, proximal_weight=0.0,
        initial_alignment_steps=0, alignment_steps=0, emulator_drop_ratio=0.0,
    )  # fmt: skip
    start = runner.server.models.split.to_full(runner.server.client_lora)
    config = copy.deepcopy(runner.server.models.adap_fu.peft_config["client"])
    runner.train()

    plain_model = get_peft_model(tiny_model(dtype=torch.float64), config)
    set_lora_state(plain_model, "default", start)
    args = SFTConfig(
        str(tmp_path / "plain"), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, adam_beta2=0.95,
        lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to="none", **{CHECKPOINTING: False},
    )  # fmt: skip
    plain = SFTTrainer(plain_model, args, train_dataset=sums(0, 8), processing_class=tokenizer)
    loss = plain.train().training_loss

    # The trainer sums the losses of the eight steps in float32: each of seven sums rounds by half of its epsilon, and each
    # loss, of the same float64 numbers, by as much.
    rounding = 4 * torch.finfo(torch.float32).eps
    assert rounds_of(runner)[0]["client_losses"]["only"] == pytest.approx(loss, rel=rounding)
    result = runner.server.models.split.to_full(runner.server.client_lora)
    trained = get_lora_state(plain_model, "default")
    assert all(torch.allclose(result[key], trained[key], rtol=0, atol=HALF_THE_DIGITS) for key in trained)


def test_same_seed_same_run(make_runner, plain, tmp_path):
    """In whatever order the clients are named."""
    again = make_runner(client_datasets={"south": sums(8, 12), "north": sums(0, 8)})
    assert list(again.clients) == list(reversed(plain.clients))
    again.train()
    assert numbers_of(again) == numbers_of(plain)
    assert_same(again.server.client_lora, plain.server.client_lora)
    other = make_runner(output_dir=str(tmp_path / "other"), seed=7)
    other.train()
    assert numbers_of(other) != numbers_of(plain)


def test_nothing_depends_on_what_the_other_party_left(make_runner, plain, monkeypatch):
    """Scribble over both LoRAs of the shared modules before each step of either party: the same run."""
    runner = make_runner()
    models = runner.server.models

    def scribble():
        for adapter in ("client", "emulator"):
            state = get_lora_state(models.adap_emu, adapter)
            set_lora_state(models.adap_emu, adapter, {key: torch.full_like(t, 9.0) for key, t in state.items()})
        models.plug_in({key: torch.full_like(t, 9.0) for key, t in models.extract().items()})

    def scribbled(method):
        def wrapper(*args, **kwargs):
            scribble()
            result = method(*args, **kwargs)
            scribble()
            return result

        return wrapper

    for name in ("align", "start_round", "receive", "aggregate", "package", "save_client_lora"):
        monkeypatch.setattr(runner.server, name, scribbled(getattr(runner.server, name)))
    for client in runner.clients.values():
        monkeypatch.setattr(client, "fit", scribbled(client.fit))
    runner.train()
    assert numbers_of(runner) == numbers_of(plain)
    assert_same(runner.server.client_lora, plain.server.client_lora)
    assert_same(runner.server.emulator_lora, plain.server.emulator_lora)


def test_all_that_crosses_the_line_is_bytes(make_runner, monkeypatch):
    runner = make_runner(local_steps=1)
    seen = []
    for client in runner.clients.values():

        def fit(payload, fit=client.fit):
            reply = fit(payload)
            seen.append((payload, reply))
            return reply

        monkeypatch.setattr(client, "fit", fit)
    runner.train()
    assert len(seen) == 4
    assert all(isinstance(payload, bytes) and isinstance(reply, bytes) for payload, reply in seen)
    update = ClientUpdate.from_bytes(seen[0][1], server_round=1, client_lora=runner.server.client_lora)
    assert set(update.metrics) == {"loss", "proximal_term", "zero_shot_loss"}
    assert update.num_examples == 24


# ---- settings


def test_clients_are_sampled(make_runner):
    data = {f"c{i}": sums(i, i + 3) for i in range(5)}
    runner = make_runner(client_datasets=data, fraction_train=0.4, num_rounds=4, local_steps=2, eval_dataset=None)
    runner.train()
    sampled = [tuple(record["client_losses"]) for record in rounds_of(runner)]
    assert all(len(names) == 2 for names in sampled)
    assert len(set(sampled)) > 1
    steps = {name: 2 * sum(name in names for names in sampled) for name in data}
    assert runner.server.client_steps == {name: number for name, number in steps.items() if number}


def test_train_dataset_is_partitioned(make_runner):
    runner = make_runner(train_dataset=sums(0, 12), num_clients=4)
    assert {name: client.num_examples for name, client in runner.clients.items()} == {
        f"client-{i}": 9 for i in range(4)
    }


def test_evaluation_every_few_rounds(make_runner):
    runner = make_runner(num_rounds=5, eval_rounds=2, alignment_steps=0, local_steps=1)
    runner.train()
    assert [r["server_round"] for r in rounds_of(runner) if r["adap_fu_loss"] is not None] == [2, 4, 5]
    assert all(record["alignment_l2"] is None for record in rounds_of(runner))
    card = (runner.folder.client_lora / "README.md").read_text()
    assert f"of which round {runner.summary.best_round} was the best of those evaluated and is this one" in card


def test_without_evaluation_and_alignment(make_runner):
    runner = make_runner(
        eval_dataset=None, public_dataset=None, initial_alignment_steps=0, alignment_steps=0, proximal_weight=0.0
    )
    summary = runner.train()
    assert summary.adap_fu is None
    assert runner.server.trainer is None
    assert rounds_of(runner)[0]["proximal_terms"] == {"north": None, "south": None}


def test_callbacks_see_a_round_as_a_step(make_runner):
    seen = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)
            if state.global_step == 2:
                control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(sorted(logs)[0])

    runner = make_runner(callbacks=[Recorder()], num_rounds=5, local_steps=1)
    runner.train()
    assert seen == ["alignment_kl", 1, "alignment_kl", 2]
    assert len(rounds_of(runner)) == 2


def test_push_to_hub(plain, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            pushed["private"] = private
            return type("Url", (), {"repo_id": repo_id})

        def create_branch(self, repo_id, branch, exist_ok):
            pushed["branch"] = branch

        def upload_folder(self, repo_id, folder_path, revision):
            assert revision == pushed.get("branch")
            pushed["files"] = sorted(path.name for path in folder_path.iterdir())
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("fedbiot_trainer.output.hub.HfApi", Api)
    assert plain.push_to_hub() == "https://hub/run"  # the folder's name
    assert plain.push_to_hub("me/lora", private=True, token="t") == "https://hub/me/lora"
    assert pushed == {
        "token": "t", "private": True,
        "files": [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json",
            "tokenizer_config.json",
        ],
    }  # fmt: skip


def test_a_hub_that_cannot_be_reached_is_noticed_first(make_runner, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ConnectionError("no Hub here")

    monkeypatch.setattr("fedbiot_trainer.output.hub.HfApi.create_repo", refuse)
    runner = make_runner(push_to_hub=True)
    with pytest.raises(ConnectionError, match="no Hub here"):
        runner.train()
    assert not runner.folder.package.exists()


# ---- what must not be used, and what cannot work


def spoil(client, change):
    """Make a client answer something else from round 2 on."""
    fit, like = client.fit, client.trainer.model

    def answer(payload):
        update = ClientUpdate.from_bytes(fit(payload), client_lora=get_lora_state(like, "client"))
        return update.to_bytes() if update.server_round == 1 else change(update)

    client.fit = answer


def with_state(update, change):
    update.client_lora = {key: change(tensor) for key, tensor in update.client_lora.items()}
    return update.to_bytes()


def altered(update):
    data = bytearray(update.to_bytes())
    data[-1] ^= 255
    return bytes(data)


def with_fields(update, **fields):
    for name, value in fields.items():
        setattr(update, name, value)
    return update.to_bytes()


BAD_UPDATES = {
    "truncated": (lambda update: update.to_bytes()[:-10], "truncated or altered"),
    "altered": (altered, "truncated or altered"),
    "another-round": (lambda update: with_fields(update, server_round=1), "from round 1, but this is round 2"),
    "another-client": (lambda update: with_fields(update, client="north"), "signed by client 'north'"),
    "wrong-shape": (lambda update: with_state(update, lambda t: t[:-1]), "expected shape [4, 48]"),
    "wrong-dtype": (lambda update: with_state(update, lambda t: t.half()), "torch.float16"),
    "not-finite": (lambda update: with_state(update, lambda t: t * float("nan")), "not finite"),
    "loss-not-finite": (
        lambda update: with_fields(update, metrics={"loss": float("inf")}),
        "expected a finite number",
    ),
    "not-a-payload": (lambda update: b"hello", "not a FedBiOT payload"),
}


@pytest.fixture(scope="module")
def run_with_bad_updates(shared_run):
    """A good client, north, and one for each kind of bad update."""

    def prepare(runner):
        for kind, (change, _) in BAD_UPDATES.items():
            spoil(runner.clients[kind], change)

    data = {"north": sums(0, 8), **{kind: sums(8, 10) for kind in BAD_UPDATES}}
    return shared_run(prepare, client_datasets=data, num_rounds=3, local_steps=1)


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_bad_update_is_refused(run_with_bad_updates, kind):
    first, second, third = rounds_of(run_with_bad_updates)
    assert kind in first["client_losses"]
    assert BAD_UPDATES[kind][1] in second["refused"][kind]
    assert kind in third["refused"]


def test_rounds_go_on_without_bad_updates(run_with_bad_updates):
    first, *others = rounds_of(run_with_bad_updates)
    assert first["client_losses"].keys() == {"north", *BAD_UPDATES} and first["refused"] == {}
    for record in others:
        assert list(record["client_losses"]) == ["north"]
        assert record["refused"].keys() == BAD_UPDATES.keys()
    assert all(torch.isfinite(tensor).all() for tensor in run_with_bad_updates.server.client_lora.values())


@pytest.mark.figures
def test_rounds_without_a_valid_update_stop_the_run(make_runner):
    runner = make_runner(num_rounds=9, local_steps=1)
    for client in runner.clients.values():
        spoil(client, BAD_UPDATES["not-finite"][0])
    with pytest.raises(RuntimeError, match="In 3 rounds in a row, fewer than 1 clients .*'north': .*not finite"):
        runner.train()
    records = rounds_of(runner)
    assert [len(record["refused"]) for record in records] == [0, 2, 2, 2]
    assert [record["counted"] for record in records] == [True, False, False, False]
    assert (runner.folder.path / "rounds.png").exists()
    result = PeftModel.from_pretrained(tiny_model(), runner.folder.path / "client_lora")
    saved = runner.server.models.split.to_emulator(get_lora_state(result, "default"))
    assert_same(saved, runner.server.client_lora)
    assert runner.server.client_steps == {"north": 1, "south": 1}


def test_second_update_of_a_client_is_refused(make_runner):
    runner = make_runner()
    runner.server.begin_round()
    reply = runner.clients["north"].fit(runner.server.start_round(1, ["north"])["north"])
    runner.server.receive(1, "north", reply)
    with pytest.raises(PayloadError, match="Client 'north' has sent an update in this round already"):
        runner.server.receive(1, "north", reply)


def test_client_refuses_a_bad_start(make_runner):
    runner = make_runner()
    client, start = runner.clients["north"], runner.server.start_round(1, ["north"])["north"]
    with pytest.raises(PayloadError, match="truncated or altered"):
        client.fit(start[:-1])
    foreign = RoundStart(1, LocalWork(1, 0, 0, 1, 0.0, 0), runner.server.client_lora, {"x": torch.ones(1)}).to_bytes()
    with pytest.raises(PayloadError, match="The round start has missing or unknown tensors: 'emulator_lora/"):
        client.fit(foreign)


def test_folder_of_another_run_is_refused(make_runner, plain, tmp_path):
    shutil.copytree(plain.folder.path, tmp_path / "run")
    with pytest.raises(ValueError, match="`output_dir` is .* holds another run .*`overwrite_output_dir=True`"):
        make_runner().train()
    again = make_runner(overwrite_output_dir=True, num_rounds=1, local_steps=1)
    assert len(rounds_of(again)) == 2  # nothing is deleted before training starts
    again.train()
    assert len(rounds_of(again)) == 1


def test_fully_masked_client_dataset(make_runner):
    data = {"north": sums(0, 8), "south": sums(10, 12)}
    with pytest.raises(ValueError, match="The dataset of client 'south' has no token to train on: .* `max_length`"):
        make_runner(client_datasets=data, max_length=5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"client_datasets": {"a": sums(0, 0)}}, "The dataset of client 'a' is empty"),
        ({"client_datasets": [("a", sums(0, 2)), ("a", sums(0, 2))]}, "more than once"),
        ({"public_dataset": None}, "`public_dataset` is None, but the emulator is aligned"),
        ({"public_dataset": sums(0, 0)}, "`public_dataset` is empty"),
        ({"emulator_drop_ratio": 1.0}, "`emulator_drop_ratio` is 1.0"),
        ({"num_adapter_layers": 8}, "`num_adapter_layers` is 8"),
        ({"eval_drift": True, "eval_dataset": None}, "`eval_drift` is True, but `eval_dataset` is None"),
        ({"peft_config": LoraConfig(target_modules=["nothing"])}, "matches no linear layer"),
        (
            {"eval_metric": "exact_match", "eval_dataset": None},
            "`eval_metric` is 'exact_match', but `eval_dataset` is None",
        ),
        (
            {"eval_metric": "exact_match", "eval_dataset": sums(0, 0)},
            "`eval_metric` is 'exact_match', but `eval_dataset` is empty",
        ),
        (
            {"eval_metric": "exact_match", "eval_dataset": sums(0, 2).rename_column("prompt", "question")},
            "`eval_dataset` has no plain `prompt` column",
        ),
        (
            {"eval_metric": "exact_match", "eval_reference_column": "answer"},
            "`eval_reference_column` is 'answer', but `eval_dataset` has no such column .it has: prompt, completion",
        ),
        ({"eval_metric": "no/such/metric"}, "`eval_metric` is 'no/such/metric', which cannot be loaded"),
        ({"eval_metric": "no_such_metric"}, "`eval_metric` is 'no_such_metric', which cannot be loaded"),
        ({"eval_metric": "pass_at_k"}, "set the environment variable HF_ALLOW_CODE_EVAL"),
        (
            {"eval_metric": "gsm8k_accuracy", "eval_reference_column": "prompt", "eval_dataset": WORDS},
            r"`references\[0\]` is 'a=', which has no final answer",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_training(make_runner, tmp_path, settings, message, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match=message):
        make_runner(**settings)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


# A module of the user's own.
LENGTHS = """
import datasets
import evaluate


class Lengths(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return RESULT
"""


def lengths(folder, result):
    (folder / "lengths").mkdir()
    (folder / "lengths" / "lengths.py").write_text(LENGTHS.replace("RESULT", result))
    return str(folder / "lengths")


def test_metric_of_the_users(make_runner, tmp_path):
    result = "{'number': len(references), 'all': list(map(len, references)), 'loss': -1.0}"
    settings = {"eval_metric": lengths(tmp_path, result), "eval_max_new_tokens": 2}
    summary = make_runner(num_rounds=1, local_steps=1, eval_dataset=sums(50, 52), **settings).train()
    for name in ("zero_shot", "adap_emu", "adap_fu"):
        scores = getattr(summary, name)
        assert list(scores) == ["loss", "token_accuracy", "number"]
        assert scores["number"] == 6
        assert scores["loss"] > 0


def test_metric_without_a_number(make_runner, tmp_path):
    with pytest.raises(
        ValueError, match="`eval_metric` is '.*lengths', but for the first example it returns no number"
    ):
        make_runner(eval_metric=lengths(tmp_path, "{'all': references, 'loss': 1.0}"))


@pytest.mark.usefixtures("pass_at_k")
def test_generated_code_is_run(make_runner):
    """The prompt would pass the tests, and no completion of this model's does."""
    rows = {"prompt": ["x=1"] * 2, "completion": ["2"] * 2, "test_list": [["assert x == 1"], ["assert x", "assert 1"]]}
    settings = {"eval_metric": "pass_at_k", "eval_reference_column": "test_list", "eval_max_new_tokens": 3}
    summary = make_runner(num_rounds=1, local_steps=1, eval_dataset=Dataset.from_dict(rows), **settings).train()
    assert [getattr(summary, name)["pass_at_1"] for name in ("zero_shot", "adap_emu", "adap_fu")] == [0, 0, 0]


def test_tokenizer_larger_than_the_embedding(make_runner):
    with pytest.raises(ValueError, match="`processing_class` has a vocabulary of 45 tokens, .* has 40 rows"):
        make_runner(model=tiny_model(vocab_size=40))


def test_tokenizer_is_loaded_as_the_model_is(make_args, tokenizer, tmp_path, monkeypatch):
    seen = {}
    tiny_model().save_pretrained(tmp_path / "base")

    def load(name, **kwargs):
        seen.update(kwargs)
        return tokenizer

    monkeypatch.setattr("fedbiot_trainer.federation.loading.AutoTokenizer.from_pretrained", load)
    args = make_args(model_init_kwargs={"revision": "v2"}, trust_remote_code=True)
    FederatedRunner(str(tmp_path / "base"), args, {"a": sums(0, 2)}, public_dataset=sums(0, 2))
    assert seen == {"revision": "v2", "trust_remote_code": True}


def test_loaded_model_needs_a_tokenizer(make_args):
    with pytest.raises(ValueError, match="`processing_class` is None"):
        FederatedRunner(tiny_model(), make_args(), {"a": sums(0, 2)}, public_dataset=sums(0, 2))


def test_a_runner_trains_once(plain):
    with pytest.raises(ValueError, match="This runner has trained 2 rounds"):
        plain.train()
    assert len(rounds_of(plain)) == 2


def test_settings_that_json_does_not_know(make_runner):
    runner = make_runner(num_rounds=1, local_steps=1, eval_dataset=None, model_init_kwargs={"dtype": torch.float32})
    assert "float32" in runner.train().settings["model_init_kwargs"]["dtype"]


def test_settings_without_effect_are_named(make_runner, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_runner(num_train_epochs=7)
    assert "`num_train_epochs` is 7, which has no effect" in caplog.text


@pytest.mark.parametrize(
    "setting",
    [
        {CHECKPOINTING: True},
        {"dataloader_num_workers": 1},
        {"teacher": "online"},
        {"offload_full_model": True},
        slow({"torch_compile": True}),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_how_it_is_computed_changes_nothing(make_runner, plain, setting):
    summary = make_runner(**setting).train()
    for name in ("adap_emu", "adap_fu"):
        assert getattr(summary, name) == pytest.approx(getattr(plain.summary, name), rel=1e-4)


@pytest.mark.parametrize(
    "setting", [{"packing_strategy": "wrapped"}, {"packing_strategy": "bfd"}], ids=["wrapped", "bfd"]
)
def test_clients_pack_their_texts(make_runner, setting):
    runner = make_runner(packing=True, max_length=32, num_rounds=1, local_steps=15, **setting)
    assert len(runner.clients["north"].train_dataset) < 24
    assert runner.clients["north"].num_examples == 24  # the weight in the average
    losses = runner.train()
    assert losses.adap_fu["loss"] < losses.zero_shot["loss"]
