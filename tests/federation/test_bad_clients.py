"""One bad client of five: rules that trust no one stay near a run without it, FedAvg does not."""

import pytest
from conftest import sums

from fedbiot_trainer import ClientUpdate, RoundStart
from fedbiot_trainer.shared.lora_state import EMULATOR, get_lora_state


pytestmark = pytest.mark.slow

# The full model is the emulator: nothing but the rule decides what AdapFu becomes.
SETTINGS = {
    "emulator_drop_ratio": 0.0, "initial_alignment_steps": 0, "alignment_steps": 0, "eval_rounds": 0, "num_rounds": 3,
    "min_train_clients": 5,
}  # fmt: skip
FLIP, HUGE = -1.0, 100.0
# A flipped change slows learning down, which shows while there is much to learn. A huge one throws off what was learned.
PACE = {FLIP: {"local_steps": 6, "learning_rate": 5e-3}, HUGE: {"local_steps": 10, "learning_rate": 1e-2}}
TEXT = sums(0, 20)


@pytest.fixture(scope="module")
def losses():
    """Those of runs so far: several tests ask for the same."""
    return {}


@pytest.fixture
def final_loss(make_runner, tmp_path, losses):
    def run(aggregation, attack, clean=False):
        """Loss of AdapFu where one client answers with its change times `attack`, or none does."""
        if (aggregation, attack, clean) not in losses:
            runner = make_runner(
                client_datasets={f"c{i}": TEXT.shard(5, i) for i in range(5)}, eval_dataset=TEXT,
                output_dir=str(tmp_path / f"{aggregation}-{clean}"), aggregation=aggregation, **SETTINGS, **PACE[attack],
            )  # fmt: skip
            if not clean:
                spoil(runner.clients["c4"], attack)
            losses[aggregation, attack, clean] = runner.train().adap_fu["loss"]
        return losses[aggregation, attack, clean]

    return run


def spoil(client, factor):
    honest_fit = client.fit

    def fit(start):
        reply, lora = honest_fit(start), client.trainer.package_lora
        emulator_lora = get_lora_state(client.trainer.model, EMULATOR)
        sent = RoundStart.from_bytes(start, client_lora=lora, emulator_lora=emulator_lora).client_lora
        update = ClientUpdate.from_bytes(reply, client_lora=lora)
        update.client_lora = {key: t + factor * (update.client_lora[key] - t) for key, t in sent.items()}
        return update.to_bytes()

    client.fit = fit


ATTACKS = [pytest.param(FLIP, id="sign-flip"), pytest.param(HUGE, id="100x")]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "multi_krum"])
def test_rules_that_trust_no_one(final_loss, aggregation, attack):
    assert final_loss(aggregation, attack) < 1.1 * final_loss("fedavg", attack, clean=True)


@pytest.mark.parametrize("attack", ATTACKS)
def test_fedavg_trusts_everyone(final_loss, attack):
    assert final_loss("fedavg", attack) > 1.1 * final_loss("fedavg", attack, clean=True)


def test_norm_clipping_bounds_what_a_client_can_do(final_loss):
    assert final_loss("norm_clipping", HUGE) < 1.1 * final_loss("fedavg", HUGE, clean=True)
