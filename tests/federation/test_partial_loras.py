"""Client LoRAs that travel in part: with a fixed A, and of a smaller rank."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ALL_PUBLIC_TEXT, assert_same, random_lora, slow, sums, tiny_model
from peft import LoraConfig

from fedbiot_trainer import ClientSFTTrainer, ClientUpdate, EmulatorPackage, FederatedClient, RoundStart
from fedbiot_trainer.federation.costs import plan
from fedbiot_trainer.shared.lora_state import arrived, get_lora_state, is_a, set_lora_state, traveling


THREE = {"north": sums(0, 8), "south": sums(8, 12), "west": sums(12, 20)}
RANKS = {"client_ranks": ["south=1", "west=3"], "aggregation": "svd"}


def watched(runner):
    """All payloads of the runner's clients: `(client, start, reply)`."""
    seen = []
    for client in runner.clients.values():

        def fit(start, client=client, fit=client.fit):
            reply = fit(start)
            seen.append((client.name, start, reply))
            return reply

        client.fit = fit
    return seen


def scribble(runner):
    """Leave nonsense in the modules between all that the parties do."""
    models = runner.server.models

    def scribbled(method):
        def wrapper(*args, **kwargs):
            for name in ("client", "emulator"):
                state = get_lora_state(models.adap_emu, name)
                set_lora_state(models.adap_emu, name, {key: torch.full_like(t, 9.0) for key, t in state.items()})
            return method(*args, **kwargs)

        return wrapper

    for name in ("align", "start_round", "receive", "aggregate"):
        setattr(runner.server, name, scribbled(getattr(runner.server, name)))
    for client in runner.clients.values():
        client.fit = scribbled(client.fit)


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def finished(make_runner, runs, tmp_path_factory):
    """
    A finished run with some settings, one for all tests that only look at it: the `runner`, what it had `before`
    (client LoRA and emulator LoRA), what has been `seen` of the payloads and the `summary`.
    """

    def finished(**settings):
        if str(settings) not in runs:
            runner = make_runner(output_dir=str(tmp_path_factory.mktemp("run")), **settings)
            before, seen = (dict(runner.server.client_lora), dict(runner.server.emulator_lora)), watched(runner)
            summary = runner.train()
            runs[str(settings)] = SimpleNamespace(runner=runner, before=before, seen=seen, summary=summary)
        return runs[str(settings)]

    return finished


def test_arrived_is_what_traveled():
    whole = random_lora({"x.lora_A.weight": torch.empty(4, 6), "x.lora_B.weight": torch.empty(5, 4)})
    assert_same(arrived(traveling(whole), whole), whole)
    assert_same(arrived(traveling(whole, freeze_a=True), whole), whole)
    small = arrived(traveling(whole, rank=2), whole)
    a, b = whole["x.lora_A.weight"], whole["x.lora_B.weight"]
    assert torch.equal(small["x.lora_B.weight"] @ small["x.lora_A.weight"], b[:, :2] @ a[:2])
    assert {key: t.shape for key, t in small.items()} == {key: t.shape for key, t in whole.items()}


# ---- a fixed A


def test_fixed_a_never_travels_and_never_changes(finished):
    run = finished(freeze_a=True)
    (before, _), after = run.before, run.runner.server.client_lora
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key]) == is_a(key), key
    assert len(run.seen) == 4
    assert b"lora_A" not in b"".join(reply for _, _, reply in run.seen)
    assert run.summary.adap_emu["loss"] < run.summary.zero_shot["loss"]
    # The folders hold the whole LoRA.
    assert_same(EmulatorPackage.load(run.runner.folder.package).client_lora, after)


def test_half_the_bytes(finished):
    sizes = []
    for freeze_a in (False, True):
        run = finished(freeze_a=freeze_a, num_rounds=1)
        (down, up), (_, start, reply) = run.runner.server.payload_sizes(), run.seen[0]
        assert abs(len(start) - down) < 50
        assert abs(len(reply) - up) < 150  # its name and metrics
        sizes.append((down, up))
        state = run.runner.server.client_lora
    saved = sum(tensor.nbytes for key, tensor in state.items() if is_a(key))
    all_bytes = sum(tensor.nbytes for tensor in state.values())
    assert 0.3 < saved / all_bytes < 0.7
    for whole, part in zip(*sizes, strict=True):
        assert whole - part > saved  # and the names of its tensors


def test_mean_of_b_is_the_mean_of_products(finished):
    run = finished(freeze_a=True, num_rounds=1)
    after = run.runner.server.client_lora
    part = traveling(after, freeze_a=True)
    updates = [ClientUpdate.from_bytes(reply, client_lora=part) for _, _, reply in run.seen]
    total = sum(update.num_examples for update in updates)
    for key in part:
        a = after[key.replace("lora_B", "lora_A")].double()
        mean = sum(u.num_examples / total * u.client_lora[key].double() @ a for u in updates)
        assert torch.allclose(after[key].double() @ a, mean, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["fedadam", "median", slow("multi_krum"), slow("norm_clipping")])
def test_fixed_a_with_other_rules(make_runner, aggregation):
    clients = {f"c{i}": sums(4 * i, 4 * i + 4) for i in range(5)}
    runner = make_runner(
        client_datasets=clients,
        freeze_a=True,
        aggregation=aggregation,
        min_train_clients=5,
        num_rounds=2,
        local_steps=1,
    )
    before = dict(runner.server.client_lora)
    runner.train()
    for key, tensor in runner.server.client_lora.items():
        assert torch.equal(tensor, before[key]) == is_a(key), key


def test_fixed_a_does_not_depend_on_what_the_modules_hold(make_runner, finished, tmp_path):
    plain = finished(freeze_a=True).runner
    scribbled = make_runner(freeze_a=True, output_dir=str(tmp_path / "scribbled"))
    scribble(scribbled)
    scribbled.train()
    assert_same(scribbled.server.client_lora, plain.server.client_lora)


def test_client_trainer_alone_fixes_a(finished, make_args, tokenizer, tmp_path):
    runner = finished(freeze_a=False, num_rounds=1).runner
    args = make_args(freeze_a=True, output_dir=str(tmp_path / "alone"))
    trainer = ClientSFTTrainer(str(runner.folder.package), args, sums(0, 8), processing_class=tokenizer)
    before = get_lora_state(trainer.model, "client")
    trainer.train()
    for key, tensor in get_lora_state(trainer.model, "client").items():
        assert torch.equal(tensor, before[key]) == is_a(key), key


def test_server_trains_both_matrices_of_the_emulator_lora(finished):
    run = finished(freeze_a=True, num_rounds=1)
    _, before = run.before
    assert not any(torch.equal(tensor, before[key]) for key, tensor in run.runner.server.emulator_lora.items())


def test_client_of_a_server_with_another_setting(finished, make_args, tokenizer, tmp_path):
    runner = finished(freeze_a=True, num_rounds=1).runner
    args = make_args(output_dir=str(tmp_path / "alone"))
    trainer = ClientSFTTrainer(str(runner.folder.package), args, sums(0, 8), processing_class=tokenizer)
    start = runner.server.start_round(2, ["north"])["north"]
    with pytest.raises(ValueError, match="The round start has missing or unknown tensors: .*lora_A"):
        FederatedClient("north", trainer, sums(0, 8)).fit(start)


def test_fixed_a_resumes_as_it_was(make_runner, tmp_path):
    settings = {"freeze_a": True, "load_best_model_at_end": False, **ALL_PUBLIC_TEXT}  # the last round is compared
    whole = make_runner(num_rounds=2, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    settings["output_dir"] = str(tmp_path / "cut")
    make_runner(num_rounds=1, **settings).train()
    resumed = make_runner(num_rounds=2, resume_from_checkpoint=True, **settings)
    # Another start of A than the run's own would not be noticed otherwise.
    resumed.trainer.package_lora = {key: t + 1 for key, t in resumed.trainer.package_lora.items()}
    resumed.train()
    assert_same(resumed.server.client_lora, whole.server.client_lora)


def test_plan_counts_the_half(make_args):
    lora = LoraConfig(r=4, target_modules="all-linear")
    settings = {"max_length": 16, "local_steps": 1, "initial_alignment_steps": 1}
    both, one = (
        plan(tiny_model(), make_args(freeze_a=x, **settings), lora)["clients"]["fedbiot"] for x in (False, True)
    )
    assert one["trainable_parameters"] < 0.7 * both["trainable_parameters"]
    assert one["bytes_per_round_up"] < 0.7 * both["bytes_per_round_up"]
    assert one["flops_per_step"] < both["flops_per_step"]


# ---- clients with different ranks


def test_a_smaller_rank_trains_and_sends_less(finished):
    run = finished(client_datasets=THREE, **RANKS)
    runner, summary, ranks = run.runner, run.summary, {}
    for name, start, reply in run.seen:
        rank = runner.args.ranks.get(name, 4)
        part = traveling(runner.server.client_lora, rank=rank)
        order = RoundStart.from_bytes(start, client_lora=part, emulator_lora=runner.server.emulator_lora)
        update = ClientUpdate.from_bytes(reply, client_lora=part)
        for key, tensor in update.client_lora.items():
            assert tensor.shape[0 if is_a(key) else 1] == rank
            assert not torch.equal(tensor, order.client_lora[key])
        ranks.setdefault(name, []).append((len(start), len(reply)))
    assert all(small < large for small, large in zip(ranks["south"][0], ranks["west"][0], strict=True))
    assert all(small < large for small, large in zip(ranks["west"][0], ranks["north"][0], strict=True))
    down, up = (sum(pair[i] for pairs in ranks.values() for pair in pairs) for i in (0, 1))
    assert (summary.bytes["down"], summary.bytes["up"]) == (down, up)
    assert summary.adap_emu["loss"] < summary.zero_shot["loss"]
    assert runner.records[-1].aggregation["svd_residual"] > 0


def test_what_a_client_is_sent_is_the_truncated_svd(finished):
    server = finished(client_datasets=THREE, **RANKS).runner.server
    part = traveling(server.client_lora, rank=1)
    start = RoundStart.from_bytes(
        server.start_round(3, ["south"])["south"], client_lora=part, emulator_lora=server.emulator_lora
    )
    for key in (key for key in part if is_a(key)):
        other = key.replace("lora_A", "lora_B")
        u, s, v = torch.linalg.svd(server.client_lora[other].double() @ server.client_lora[key].double())
        sent = start.client_lora[other].double() @ start.client_lora[key].double()
        assert torch.allclose(sent, s[0] * u[:, :1] @ v[:1], atol=1e-5)


def test_training_at_a_rank_is_training_a_lora_of_that_rank(make_runner, make_args, tokenizer, tmp_path):
    """In the zeros of a larger LoRA a smaller one trains as it does alone."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    small = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    settings = {"num_rounds": 1, "local_steps": 5, "proximal_weight": 0.1, "initial_alignment_steps": 0}
    replies = []
    for config, rank in ((lora, 2), (small, None)):
        runner = make_runner(
            peft_config=config, emulator_peft_config=lora, output_dir=str(tmp_path / str(rank)), **settings
        )
        server = runner.server
        server.emulator_lora = {key: torch.zeros_like(t) for key, t in server.emulator_lora.items()}
        if rank:
            given = random_lora(server.client_lora)
        part = traveling(given, rank=2)
        client = FederatedClient("north", runner.trainer, sums(0, 8), rank)
        start = RoundStart(1, server._work("north", 1), part, server.emulator_lora).to_bytes()
        replies.append(ClientUpdate.from_bytes(client.fit(start), client_lora=part))
    for key, tensor in replies[0].client_lora.items():
        assert torch.allclose(tensor, replies[1].client_lora[key], atol=1e-6), key
        assert not torch.equal(tensor, part[key])


def test_an_update_of_another_rank_is_refused(make_runner):
    runner = make_runner(client_datasets=THREE, **RANKS)
    runner.server.begin_round()
    reply = ClientUpdate(1, "south", 5, {"loss": 1.0}, runner.server.client_lora).to_bytes()
    with pytest.raises(
        ValueError, match=r"of the client update is described as .*'shape': \[4, .*expected shape \[1, "
    ):
        runner.server.receive(1, "south", reply)


def test_ranks_do_not_depend_on_what_the_modules_hold(make_runner, finished, tmp_path):
    plain = finished(client_datasets=THREE, **RANKS).runner
    scribbled = make_runner(client_datasets=THREE, output_dir=str(tmp_path / "scribbled"), **RANKS)
    scribble(scribbled)
    scribbled.train()
    assert_same(scribbled.server.client_lora, plain.server.client_lora)


def test_rank_above_the_lora_is_refused(make_runner):
    with pytest.raises(ValueError, match="`client_ranks` gives client 'south' rank 5, but the client LoRA has rank 4"):
        make_runner(aggregation="svd", client_ranks=["south=5"])


def test_rank_of_no_client_is_refused(make_runner):
    with pytest.raises(ValueError, match="`client_ranks` names moon, but the clients are north, south"):
        make_runner(aggregation="svd", client_ranks=["moon=1"])
