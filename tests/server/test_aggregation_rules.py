"""Every rule of aggregation: what all promise, and each against its formula."""

import itertools
import logging
import math

import pytest
import torch
from conftest import random_lora

from fedbiot_trainer import ClientUpdate
from fedbiot_trainer.config.aggregation import AGGREGATIONS, AggregationSettings
from fedbiot_trainer.federation.state import FederationState
from fedbiot_trainer.server.aggregation import make_aggregator
from fedbiot_trainer.server.aggregation.svd import truncated_product
from fedbiot_trainer.server.aggregation.weighting import capped_shares


RANK = 2
SHAPES = {"q.lora_A.weight": (2, 6), "q.lora_B.weight": (5, 2), "v.lora_A.weight": (2, 6), "v.lora_B.weight": (4, 2)}
LIKE = {key: torch.empty(shape) for key, shape in SHAPES.items()}
MEANS = ("fedavg", "norm_clipping", "svd")
SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")


def make_update(client, seed, num_examples=10, start=None, factor=1.0):
    """An update of client `client`: `start` and a small random change, times `factor`."""
    start = START if start is None else start
    change = random_lora(LIKE, 0.01, seed)
    return ClientUpdate(1, client, num_examples, {}, {key: start[key] + factor * change[key] for key in start})


START = random_lora(LIKE, 1.0, 99)
UPDATES = [make_update(f"c{i}", seed=i, num_examples=10 * i + 7) for i in range(5)]


def make_rule(aggregation, **settings):
    return make_aggregator(AggregationSettings(aggregation=aggregation, **settings))


def run_round(rule, updates, start=None):
    rule.begin(START if start is None else start)
    for update in updates:
        rule.add(update)
    return rule.finish()


def mean_of(updates, shares):
    return {
        key: sum(share * u.client_lora[key].double() for u, share in zip(updates, shares, strict=True))
        for key in SHAPES
    }


def product(lora, name="q"):
    return lora[f"{name}.lora_B.weight"].double() @ lora[f"{name}.lora_A.weight"].double()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def assert_close(one, other, atol=1e-6):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.allclose(one[key].double(), other[key].double(), atol=atol), key


# ---- what all rules promise


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_order_does_not_matter(aggregation):
    expected = run_round(make_rule(aggregation), UPDATES)
    for order in itertools.permutations(UPDATES):
        aggregate = run_round(make_rule(aggregation), order)
        assert_equal(aggregate.client_lora, expected.client_lora)
        assert aggregate.weights == expected.weights
        assert aggregate.metrics == expected.metrics


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_sum_to_one_and_metrics_are_floats(aggregation):
    aggregate = run_round(make_rule(aggregation), UPDATES)
    assert sum(aggregate.weights.values()) == pytest.approx(1)
    assert aggregate.weights.keys() <= {update.client for update in UPDATES}
    assert all(type(value) is float and math.isfinite(value) for value in aggregate.metrics.values())
    assert {key: (t.shape, t.dtype) for key, t in aggregate.client_lora.items()} == {
        key: (t.shape, t.dtype) for key, t in START.items()
    }


@pytest.mark.parametrize("aggregation", sorted(set(AGGREGATIONS) - set(SERVER_OPTIMIZERS)))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_equal_updates_come_out_unchanged(aggregation, count):
    lora = UPDATES[0].client_lora
    updates = [ClientUpdate(1, f"c{i}", 3 * i + 1, {}, lora) for i in range(count)]
    result = run_round(make_rule(aggregation), updates).client_lora
    if aggregation == "svd":  # other factors of the same products
        for name in "qv":
            assert torch.allclose(product(result, name), product(lora, name), atol=1e-6)
    else:
        assert_equal(result, lora)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_going_on_in_a_round_and_between_rounds(aggregation, tmp_path):
    """Through a file each time, as a run that is killed does it."""

    def reloaded(rule, start):
        file = FederationState(1, start, {}, rule.state_dict(), 0, {}, {}).save(tmp_path, keep=1)
        state = FederationState.load(file)
        other = make_rule(aggregation)
        other.begin(state.client_lora)
        other.load_state_dict(state.aggregator)
        return other

    whole, cut = make_rule(aggregation), make_rule(aggregation)
    start = START
    for server_round in range(3):
        updates = [make_update(f"c{i}", 10 * server_round + i, 5 + i, start) for i in range(5)]
        expected = run_round(whole, updates, start)
        cut.begin(start)
        for update in updates[:2]:
            cut.add(update)
        taken = cut.state_dict()
        cut = reloaded(cut, start)
        for update in updates[2:]:
            cut.add(update)
        assert len(str(taken)) > 0
        assert_equal(cut.finish().client_lora, expected.client_lora)
        start = expected.client_lora
        cut = reloaded(cut, start)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_state_that_was_taken_stays_as_it_was(aggregation):
    rule = make_rule(aggregation)
    run_round(rule, UPDATES)
    rule.begin(START)
    rule.add(UPDATES[0])
    state = rule.state_dict()
    for update in UPDATES[1:]:
        rule.add(update)
    expected = rule.finish().client_lora
    other = make_rule(aggregation)
    other.begin(START)
    other.load_state_dict(state)
    for update in UPDATES[1:]:
        other.add(update)
    assert_equal(other.finish().client_lora, expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_update_is_kept_after_a_round(aggregation):
    rule = make_rule(aggregation)
    run_round(rule, UPDATES)
    assert not any(update.client in str(rule.state_dict()) for update in UPDATES)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_average(aggregation):
    with pytest.raises(ValueError, match="No update was added"):
        run_round(make_rule(aggregation), [])


def test_no_such_rule():
    with pytest.raises(ValueError, match="`aggregation` is 'mode', which is no rule"):
        make_rule("mode")


# ---- weights


@pytest.mark.parametrize("aggregation", MEANS)
def test_uniform_weights(aggregation):
    aggregate = run_round(make_rule(aggregation, aggregation_weights="uniform"), UPDATES)
    assert aggregate.weights == {f"c{i}": 0.2 for i in range(5)}


def test_uniform_average():
    aggregate = run_round(make_rule("fedavg", aggregation_weights="uniform"), UPDATES)
    assert_close(aggregate.client_lora, mean_of(UPDATES, [0.2] * 5))


@pytest.mark.parametrize(
    "weights, cap, expected",
    [
        ([1, 1, 2], 1.0, [0.25, 0.25, 0.5]),
        ([1, 1, 2], 0.4, [0.3, 0.3, 0.4]),
        ([10**12, 30, 10], 0.5, [0.5, 0.375, 0.125]),
        ([10**12, 30, 10], 0.4, [0.4, 0.4, 0.2]),  # what the first leaves lifts the second above the cap
        ([100, 1, 1], 0.2, [1 / 3] * 3),
        ([100, 1], 0.5, [0.5, 0.5]),
        ([7], 0.1, [1.0]),
    ],
)
def test_capped_shares(weights, cap, expected):
    shares = capped_shares({f"c{i}": weight for i, weight in enumerate(weights)}, cap)
    assert list(shares) == [f"c{i}" for i in range(len(weights))]
    assert list(shares.values()) == pytest.approx(expected)


def test_capped_shares_for_all_sorts_of_weights():
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 9):
        for cap in (0.05, 0.2, 0.3, 0.5, 0.9):
            weights = (10 ** (12 * torch.rand(count, generator=generator))).long().tolist()
            shares = list(capped_shares({str(i): max(1, weight) for i, weight in enumerate(weights)}, cap).values())
            assert sum(shares) == pytest.approx(1)
            assert max(shares) <= max(cap, 1 / count) + 1e-12
            assert sorted(shares) == [shares[i] for i in sorted(range(count), key=weights.__getitem__)]


@pytest.mark.parametrize("aggregation", MEANS)
def test_a_client_that_claims_many_examples_does_not_own_the_average(aggregation):
    updates = [*UPDATES[:4], make_update("liar", 8, num_examples=10**12)]
    owned = run_round(make_rule(aggregation), updates)
    assert owned.weights["liar"] > 0.999
    aggregate = run_round(make_rule(aggregation, max_client_share=0.3), updates)
    assert aggregate.weights["liar"] == pytest.approx(0.3)
    honest = [aggregate.weights[f"c{i}"] for i in range(4)]
    assert honest == pytest.approx(
        [0.7 * u.num_examples / sum(u.num_examples for u in UPDATES[:4]) for u in UPDATES[:4]]
    )


def test_capped_average():
    updates = [*UPDATES[:4], make_update("liar", 8, num_examples=10**12)]
    aggregate = run_round(make_rule("fedavg", max_client_share=0.3), updates)
    assert_close(aggregate.client_lora, mean_of(updates, [aggregate.weights[u.client] for u in updates]))


# ---- optimizers at the server


def rounds_of_changes(rule, num_rounds=4):
    """The rule's LoRA after each round, and the changes of plain averages that it saw."""
    start, results, seen = START, [], []
    for server_round in range(num_rounds):
        updates = [make_update(f"c{i}", 10 * server_round + i, 5 + i, start) for i in range(3)]
        mean = run_round(make_rule("fedavg"), updates, start).client_lora
        seen.append({key: mean[key].double() - start[key].double() for key in SHAPES})
        results.append({key: tensor.double() for key, tensor in start.items()})
        start = run_round(rule, updates, start).client_lora
    return [*results, start], seen


def test_fedavgm_without_momentum_is_fedavg():
    rule, plain = make_rule("fedavgm", server_learning_rate=1.0, server_momentum=0.0), make_rule("fedavg")
    start = START
    for server_round in range(3):
        updates = [make_update(f"c{i}", 10 * server_round + i, 5 + i, start) for i in range(3)]
        expected = run_round(plain, updates, start).client_lora
        assert_equal(run_round(rule, updates, start).client_lora, expected)
        start = expected


@pytest.mark.parametrize(
    "settings, lr, beta", [({}, 1.0, 0.9), ({"server_learning_rate": 0.5, "server_momentum": 0.3}, 0.5, 0.3)]
)
def test_fedavgm_formula(settings, lr, beta):
    results, seen = rounds_of_changes(make_rule("fedavgm", **settings))
    for key in SHAPES:
        moment = 0.0
        for before, after, change in zip(results, results[1:], seen, strict=False):
            moment = beta * moment + change[key]
            assert torch.allclose(after[key].double(), before[key] + lr * moment, atol=1e-6)


SECOND_MOMENTS = {
    "fedadam": lambda v, g, beta2: beta2 * v + (1 - beta2) * g**2,
    "fedyogi": lambda v, g, beta2: v - (1 - beta2) * g**2 * torch.sign(v - g**2),
    "fedadagrad": lambda v, g, beta2: v + g**2,
}


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("aggregation", SECOND_MOMENTS)
def test_adaptive_formulas(aggregation, changed):
    """Algorithm 2 of Reddi et al. (2021), coordinate by coordinate."""
    lr, beta1, beta2, tau = (0.1, 0.5, 0.8, 0.01) if changed else (0.01, 0.9, 0.99, 1e-3)
    settings = {"server_learning_rate": lr, "server_momentum": beta1, "server_tau": tau} if changed else {}
    if changed and aggregation != "fedadagrad":
        settings["server_beta2"] = beta2
    results, seen = rounds_of_changes(make_rule(aggregation, **settings))
    for key in SHAPES:
        m, v = torch.zeros(SHAPES[key]), torch.full(SHAPES[key], tau**2, dtype=torch.float64)
        for before, after, change in zip(results, results[1:], seen, strict=False):
            m = beta1 * m + (1 - beta1) * change[key]
            v = SECOND_MOMENTS[aggregation](v, change[key], beta2)
            assert torch.allclose(after[key].double(), before[key] + lr * m / (v.sqrt() + tau), atol=1e-6)


def test_yogi_forgets_large_changes_more_slowly_than_adam():
    large, none = make_update("c", 0, factor=100.0), ClientUpdate(1, "c", 10, {}, START)
    moments = {}
    for aggregation in ("fedadam", "fedyogi"):
        rule = make_rule(aggregation, server_beta2=0.5)
        run_round(rule, [large])
        for _ in range(5):
            run_round(rule, [none])
        moments[aggregation] = rule.state_dict()["second"]["q.lora_A.weight"]
    assert (moments["fedyogi"] > 10 * moments["fedadam"]).all()


# ---- rules that trust no one


def corrupted(factor, honest=4):
    return [*UPDATES[:honest], make_update("evil", 7, num_examples=10**6, factor=factor)]


@pytest.mark.parametrize("factor", [-1.0, 100.0, -1e6, 1e30], ids=lambda factor: f"{factor:g}x")
@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "multi_krum"])
def test_one_bad_update_stays_within_the_honest_ones(aggregation, factor):
    updates = corrupted(factor)
    result = run_round(make_rule(aggregation), updates).client_lora
    for key in SHAPES:
        honest = torch.stack([u.client_lora[key] for u in updates[:4]])
        assert (result[key] >= honest.amin(0) - 1e-6).all()
        assert (result[key] <= honest.amax(0) + 1e-6).all()


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_median_formula(count):
    result = run_round(make_rule("median", num_byzantine=0), UPDATES[:count])
    for key in SHAPES:
        stacked = torch.stack([u.client_lora[key].double() for u in UPDATES[:count]])
        assert torch.allclose(result.client_lora[key].double(), stacked.quantile(0.5, dim=0), atol=1e-6)
    assert set(result.weights.values()) == {1 / count}


@pytest.mark.parametrize(
    "fraction, count, trimmed",
    [(None, 5, 1), (None, 2, 0), (None, 3, 1), (0.4, 5, 2), (0.49, 4, 1), (0.28, 25, 7), (0.01, 10, 1)],
)
def test_trimmed_mean_formula(fraction, count, trimmed):
    updates = [make_update(f"c{i:02}", seed=i) for i in range(count)]
    result = run_round(make_rule("trimmed_mean", trim_fraction=fraction, num_byzantine=0), updates)
    assert result.metrics == {"trimmed_per_end": trimmed}
    for key in SHAPES:
        ordered = torch.stack([u.client_lora[key].double() for u in updates]).sort(0).values
        assert torch.allclose(result.client_lora[key].double(), ordered[trimmed : count - trimmed].mean(0), atol=1e-6)


def change_norm(update):
    squares = [(update.client_lora[key].double() - START[key].double()).square().sum() for key in SHAPES]
    return math.sqrt(sum(squares))


@pytest.mark.parametrize("limit", [None, 0.03], ids=["median", "fixed"])
def test_norm_clipping_formula(limit):
    updates = corrupted(100.0)
    norms = [change_norm(u) for u in updates]
    bound = sorted(norms)[2] if limit is None else limit
    result = run_round(make_rule("norm_clipping", clip_norm=limit, num_byzantine=0), updates)
    total = sum(u.num_examples for u in updates)
    for key in SHAPES:
        step = sum(
            u.num_examples / total * min(1, bound / norm) * (u.client_lora[key].double() - START[key].double())
            for u, norm in zip(updates, norms, strict=True)
        )
        assert torch.allclose(result.client_lora[key].double(), START[key].double() + step, atol=1e-6)
    assert result.metrics["clipped"] == sum(norm > bound for norm in norms)
    assert result.metrics["clip_norm"] == pytest.approx(bound)
    assert result.metrics["largest_norm"] == pytest.approx(max(norms))


def test_norm_clipping_of_clients_that_did_not_move():
    still = [ClientUpdate(1, f"c{i}", 1, {}, START) for i in range(3)]
    assert_equal(run_round(make_rule("norm_clipping"), still).client_lora, START)


def test_multi_krum_formula():
    updates, f = [*UPDATES, make_update("evil-1", 8, factor=100.0), make_update("evil-2", 9, factor=-50.0)], 2
    vectors = [torch.cat([u.client_lora[key].double().flatten() for key in SHAPES]) for u in updates]
    scores = []
    for one in vectors:
        distances = sorted(((one - other) ** 2).sum().item() for other in vectors)[1:]
        scores.append(sum(distances[: len(updates) - f - 2]))
    best = sorted(range(len(updates)), key=scores.__getitem__)[: len(updates) - f]
    result = run_round(make_rule("multi_krum", num_byzantine=f), updates)
    assert result.weights == {updates[i].client: pytest.approx(1 / 5) for i in best}
    assert not result.weights.keys() & {"evil-1", "evil-2"}
    assert_close(result.client_lora, mean_of([updates[i] for i in sorted(best)], [1 / 5] * 5))
    assert result.metrics["selected"] == 5
    assert result.metrics["worst_score"] == pytest.approx(max(scores))
    assert result.metrics["worst_kept"] == pytest.approx(sorted(scores)[4])


# ---- the mean of the products


def test_svd_is_the_best_approximation_of_the_mean_product():
    result = run_round(make_rule("svd"), UPDATES)
    cut = whole = 0.0
    for name in "qv":
        mean = sum(result.weights[u.client] * product(u.client_lora, name) for u in UPDATES)
        u, s, v = torch.linalg.svd(mean)
        best = u[:, :RANK] @ torch.diag(s[:RANK]) @ v[:RANK]
        assert torch.allclose(product(result.client_lora, name), best, atol=1e-5)
        cut, whole = cut + s[RANK:].square().sum(), whole + s.square().sum()
    assert result.metrics["svd_residual"] == pytest.approx(math.sqrt(cut / whole), rel=1e-6)
    assert result.metrics["svd_residual"] > 0


def test_mean_of_factors_is_not_the_mean_of_products():
    updates = [make_update(f"c{i}", seed=i, num_examples=1, factor=50.0) for i in range(2)]
    mean = sum(product(u.client_lora) for u in updates) / 2
    errors = {
        rule: (product(run_round(make_rule(rule), updates).client_lora) - mean).norm() for rule in ("fedavg", "svd")
    }
    assert errors["svd"] < 0.8 * errors["fedavg"]


def test_svd_factors_are_balanced_and_sorted():
    lora = run_round(make_rule("svd"), UPDATES).client_lora
    a, b = lora["q.lora_A.weight"].double(), lora["q.lora_B.weight"].double()
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)
    assert torch.allclose(a @ a.mT, torch.diag(a.norm(dim=1) ** 2), atol=1e-5)
    assert (a.norm(dim=1).diff() < 0).all()


def test_svd_of_what_fits_leaves_nothing_out():
    updates = [ClientUpdate(1, f"c{i}", 1, {}, START) for i in range(3)]
    assert run_round(make_rule("svd"), updates).metrics["svd_residual"] < 1e-6


def test_svd_at_the_start_leaves_what_can_learn():
    """B is zero before the first step. If A became zero too, neither would ever have a gradient."""
    start = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in START.items()}
    result = run_round(make_rule("svd"), [ClientUpdate(1, f"c{i}", 1, {}, start) for i in range(3)], start)
    for name in "qv":
        assert product(result.client_lora, name).abs().max() == 0
        assert (result.client_lora[f"{name}.lora_A.weight"].norm(dim=1) > 0.1).all()
    assert result.metrics["svd_residual"] == 0


def test_svd_of_a_product_of_lower_rank_leaves_what_can_learn():
    a, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    b[:, 1:] = 0
    new_a, new_b, values = truncated_product(a, b, rank=3)
    assert torch.allclose(new_b @ new_a, b @ a)
    assert (new_a.norm(dim=1) > 0).all()
    assert values.shape == (3,)


def test_svd_of_a_matrix_narrower_than_the_rank():
    a, b = torch.randn(8, 6, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    new_a, new_b, _ = truncated_product(a, b, rank=8)
    assert (new_a.shape, new_b.shape) == ((8, 6), (3, 8))
    assert torch.allclose(new_b @ new_a, b @ a)


def test_svd_averages_clients_of_different_ranks():
    small = {key: t[:1] if "lora_A" in key else t[:, :1] for key, t in random_lora(LIKE, 1.0, 5).items()}
    updates = [UPDATES[0], ClientUpdate(1, "small", 7, {}, small)]
    result = run_round(make_rule("svd"), updates)
    mean = 0.5 * product(UPDATES[0].client_lora) + 0.5 * product(small)
    u, s, v = torch.linalg.svd(mean)
    assert torch.allclose(product(result.client_lora), u[:, :2] @ torch.diag(s[:2]) @ v[:2], atol=1e-5)


# ---- at the server


@pytest.fixture
def warned(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def aggregate_at_server(make_runner, claims, **settings):
    runner = make_runner(initial_alignment_steps=0, alignment_steps=0, **settings)
    server = runner.server
    server.begin_round()
    for client, examples in claims.items():
        server.receive(1, client, ClientUpdate(1, client, examples, {"loss": 1.0}, server.client_lora).to_bytes())
    return server.aggregate()


def test_a_client_that_owns_the_average_is_named(make_runner, warned):
    aggregate_at_server(make_runner, {"a": 10**12, "b": 300, "c": 500}, log_level="warning")
    assert "Client 'a' has 100.0% of the weight of 3 clients" in warned.text
    assert "`max_client_share`" in warned.text


@pytest.mark.parametrize(
    "claims, settings",
    [
        ({"a": 10**12, "b": 300}, {}),
        ({"a": 800, "b": 100, "c": 100}, {}),
        ({"a": 10**12, "b": 300, "c": 500}, {"max_client_share": 0.5}),
        ({"a": 10**12, "b": 300, "c": 500}, {"aggregation_weights": "uniform"}),
    ],
    ids=["two", "four fifths", "capped", "uniform"],
)
def test_no_warning_where_no_one_owns_it(make_runner, warned, claims, settings):
    aggregate_at_server(make_runner, claims, log_level="warning", **settings)
    assert "of the weight of" not in warned.text


MIXING = ("median", "trimmed_mean", "norm_clipping")


def mixed_by_hand(updates, f, weighted):
    vectors = [torch.cat([u.client_lora[key].double().flatten() for key in SHAPES]) for u in updates]
    result = []
    for update, vector in zip(updates, vectors, strict=True):
        distances = [(other - vector).norm().item() for other in vectors]
        nearest = sorted(range(5), key=distances.__getitem__)[: 5 - f]
        weights = [updates[i].num_examples if weighted else 1 for i in nearest]
        mean = mean_of([updates[i] for i in nearest], [weight / sum(weights) for weight in weights])
        mean = {key: tensor.float() for key, tensor in mean.items()}
        result.append(ClientUpdate(1, update.client, update.num_examples, {}, mean))
    return result


@pytest.mark.parametrize("f", [1, 2])
@pytest.mark.parametrize("aggregation", MIXING)
def test_mixing_formula(aggregation, f):
    """Mixed first, then the rule as in its source, weighted only where the rule is."""
    plain, mixing = make_rule(aggregation, num_byzantine=0), make_rule(aggregation, num_byzantine=f)
    updates = UPDATES
    for _ in range(2 if aggregation == "norm_clipping" else 1):
        updates = mixed_by_hand(updates, f, weighted=aggregation == "norm_clipping")
    result, expected = run_round(mixing, UPDATES), run_round(plain, updates)
    for key in SHAPES:
        assert torch.allclose(result.client_lora[key], expected.client_lora[key], rtol=0, atol=2**-22)
    assert result.weights == expected.weights


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_mixing_finds_the_mean_of_the_honest(aggregation):
    """Four that go one way with noise, one that goes the other: without mixing the middle is drawn back."""
    way = random_lora(LIKE, 0.01, 7)
    honest = [make_update(f"c{i}", seed=i, factor=0.5) for i in range(4)]
    for update in honest:
        update.client_lora = {key: update.client_lora[key] + way[key] for key in SHAPES}
    bad = make_update("c4", seed=4, factor=0.5)
    bad.client_lora = {key: bad.client_lora[key] - way[key] for key in SHAPES}
    mean = mean_of(honest, [0.25] * 4)
    result = run_round(make_rule(aggregation), [*honest, bad]).client_lora
    plain = run_round(make_rule(aggregation, num_byzantine=0), [*honest, bad]).client_lora
    for key in SHAPES:
        assert torch.allclose(result[key].double(), mean[key], rtol=0, atol=2**-22)
        assert ((plain[key] - mean[key]) * way[key]).sum() < 0


@pytest.mark.parametrize("aggregation", MIXING)
def test_two_clients_are_not_mixed(aggregation):
    results = [run_round(make_rule(aggregation, num_byzantine=f), UPDATES[:2]).client_lora for f in (0, 1)]
    assert_equal(*results)
