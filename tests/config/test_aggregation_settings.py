import pytest

from fedbiot_trainer.config.aggregation import AGGREGATIONS


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"aggregation": "mode"}, "`aggregation` is 'mode', but it must be one of fedavg"),
        ({"aggregation_weights": "loss"}, "`aggregation_weights` is 'loss', but it must be one of examples, uniform"),
        ({"max_client_share": 0.0}, r"`max_client_share` is 0.0, .* in \(0, 1\]"),
        ({"max_client_share": 1.5}, r"`max_client_share` is 1.5, .* in \(0, 1\]"),
        (
            {"max_client_share": 0.5, "aggregation": "median"},
            "`max_client_share` is 0.5, but `aggregation` is 'median'",
        ),
        ({"max_client_share": 0.5, "aggregation_weights": "uniform"}, "`max_client_share` is 0.5, .* is 'uniform'"),
        ({"server_learning_rate": 0.1}, "`server_learning_rate` is 0.1, .* 'fedavg', which does not use it.*fedavgm"),
        ({"server_momentum": 0.5, "aggregation": "svd"}, "`server_momentum` is 0.5, but `aggregation` is 'svd'"),
        ({"server_beta2": 0.5, "aggregation": "fedadagrad"}, "`server_beta2` is 0.5, .* use fedadam, fedyogi"),
        ({"server_tau": 0.1, "aggregation": "fedavgm"}, "`server_tau` is 0.1, .* use fedadam, fedyogi, fedadagrad"),
        ({"trim_fraction": 0.1, "aggregation": "median"}, "`trim_fraction` is 0.1, .* use trimmed_mean"),
        ({"clip_norm": 1.0}, "`clip_norm` is 1.0, .* use norm_clipping"),
        ({"num_byzantine": 1}, "`num_byzantine` is 1, .* use multi_krum, median"),
        ({"server_learning_rate": 0.0, "aggregation": "fedavgm"}, "`server_learning_rate` is 0.0, .* be positive"),
        ({"server_tau": 0.0, "aggregation": "fedadam"}, "`server_tau` is 0.0, .* be positive"),
        ({"clip_norm": -1.0, "aggregation": "norm_clipping"}, "`clip_norm` is -1.0, .* be positive"),
        ({"server_momentum": 1.0, "aggregation": "fedavgm"}, r"`server_momentum` is 1.0, .* in \[0, 1\)"),
        ({"server_beta2": -0.1, "aggregation": "fedadam"}, r"`server_beta2` is -0.1, .* in \[0, 1\)"),
        ({"trim_fraction": 0.5, "aggregation": "trimmed_mean"}, r"`trim_fraction` is 0.5, .* in \(0, 0.5\)"),
        ({"aggregation": "multi_krum"}, "`min_train_clients` is 1, .* Set it to at least 5"),
        (
            {"aggregation": "multi_krum", "num_byzantine": 2, "min_train_clients": 5},
            "`min_train_clients` is 5, .* Set it to at least 7",
        ),
        ({"aggregation": "multi_krum", "num_byzantine": 0}, "`num_byzantine` is 0, .* leaves out at least 1"),
        ({"aggregation": "median", "num_byzantine": -1}, "`num_byzantine` is -1, .* 0 mixes nothing"),
        ({"aggregation": "svd", "freeze_a": True}, "`freeze_a` is True, but `aggregation` is 'svd'"),
        ({"aggregation": "svd", "client_ranks": ["north"]}, "`client_ranks` must be NAME=RANK each"),
        ({"aggregation": "svd", "client_ranks": ["north=0"]}, "`client_ranks` must be NAME=RANK each"),
        ({"aggregation": "svd", "client_ranks": ["a=1", "a=2"]}, "`client_ranks` is .*, which names a client twice"),
        *(
            ({"aggregation": rule, "client_ranks": ["a=1"], "min_train_clients": 5}, f"`client_ranks` is .* '{rule}'")
            for rule in AGGREGATIONS
            if rule != "svd"
        ),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_rule_works_with_its_defaults(make_args, aggregation):
    assert make_args(aggregation=aggregation, min_train_clients=5).aggregation == aggregation


def test_ranks_by_client(make_args):
    assert make_args(aggregation="svd", client_ranks=["a=b=4", "c=16"]).ranks == {"a=b": 4, "c": 16}
    assert make_args().ranks == {}
