"""The settings of the aggregation, which go with one rule or another."""

from dataclasses import dataclass, field


ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
UNWEIGHTED = ("median", "trimmed_mean", "multi_krum")
AGGREGATIONS = ("fedavg", "fedavgm", *ADAPTIVE, *UNWEIGHTED, "norm_clipping", "svd")
AGGREGATION_WEIGHTS = ("examples", "uniform")


@dataclass
class AggregationSettings:
    """
    How the clients' updates become the next client LoRA. A setting of one rule is refused with another.

    Parameters:
        aggregation (`str`, *optional*, defaults to `"fedavg"`):
            The rule. `"fedavg"`: the weighted mean of the LoRAs, as in the paper. `"fedavgm"`, `"fedadam"`, `"fedyogi"`,
            `"fedadagrad"`: the mean change is the gradient of an optimizer at the server. `"median"`, `"trimmed_mean"`,
            `"norm_clipping"`, `"multi_krum"`: some clients may send anything. `"svd"`: the mean of the products B A.
        aggregation_weights (`str`, *optional*, defaults to `"examples"`):
            A client's weight: the number of `"examples"` that it says it holds, or `"uniform"`. `"median"`,
            `"trimmed_mean"` and `"multi_krum"` count all clients the same.
        max_client_share (`float`, *optional*, defaults to `1.0`):
            Most that one client can have of the weight of a round, in `(0, 1]`. What is above goes to the others in
            proportion. 1.0 is no cap: a client that claims a huge number of examples owns the average.
        server_learning_rate (`float`, *optional*):
            Learning rate of the server's optimizer. `None`: 1.0 for `"fedavgm"`, 0.01 for the adaptive ones.
        server_momentum (`float`, *optional*):
            Its momentum (beta1 of the adaptive ones), in `[0, 1)`. `None`: 0.9.
        server_beta2 (`float`, *optional*):
            Decay of the second moment of `"fedadam"` and `"fedyogi"`, in `[0, 1)`. `None`: 0.99.
        server_tau (`float`, *optional*):
            What the adaptive ones add to the root of the second moment. `None`: 0.001.
        trim_fraction (`float`, *optional*):
            Share of the clients that `"trimmed_mean"` leaves out at each end, in `(0, 0.5)`. `None`: 0.2.
        clip_norm (`float`, *optional*):
            Largest L2 norm of a client's change with `"norm_clipping"`. `None`: the median of the round's norms.
        num_byzantine (`int`, *optional*):
            Clients that may send anything (f), with `"multi_krum"`, which needs `min_train_clients` of 2 f + 3, and with
            `"median"`, `"trimmed_mean"` and `"norm_clipping"`: before these, each update is mixed with the nearest of
            the others, so that they see whole updates; 0 is the rule as in its source. `None`: 1.
        freeze_a (`bool`, *optional*, defaults to `False`):
            Whether the matrices A of the client LoRA stay at their start, so that the mean of the B is the mean of the
            products B A, and A never travels: half the bytes, and half the trained parameters.
        client_ranks (`list[str]`, *optional*):
            Clients whose LoRA is of a smaller rank, as `name=rank`. Only `"svd"` can average those.
    """

    aggregation: str = field(
        default="fedavg",
        metadata={"help": "Rule that makes the next client LoRA of the updates.", "choices": list(AGGREGATIONS)},
    )
    aggregation_weights: str = field(
        default="examples",
        metadata={
            "help": "A client's weight: the number of examples that it says it holds, or the same for all.",
            "choices": list(AGGREGATION_WEIGHTS),
        },
    )
    max_client_share: float = field(
        default=1.0, metadata={"help": "Most that one client can have of a round's weight, in (0, 1]. 1: no cap."}
    )
    server_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of the server's optimizer. Default: 1.0 for fedavgm, 0.01 for adaptive rules."},
    )
    server_momentum: float | None = field(
        default=None, metadata={"help": "Of the server's optimizer (beta1 of adaptive rules). Default: 0.9."}
    )
    server_beta2: float | None = field(
        default=None, metadata={"help": "Decay of the second moment of fedadam and fedyogi. Default: 0.99."}
    )
    server_tau: float | None = field(
        default=None, metadata={"help": "What adaptive rules add to the root of the second moment. Default: 0.001."}
    )
    trim_fraction: float | None = field(
        default=None, metadata={"help": "Share of clients that trimmed_mean leaves out at each end. Default: 0.2."}
    )
    clip_norm: float | None = field(
        default=None,
        metadata={"help": "Largest norm of a change with norm_clipping. Default: the median of the round's norms."},
    )
    num_byzantine: int | None = field(
        default=None, metadata={"help": "Clients that may send anything, with a robust rule. Default: 1."}
    )
    freeze_a: bool = field(
        default=False,
        metadata={"help": "Keep the matrices A of the client LoRA fixed: an exact average of half the bytes."},
    )
    client_ranks: list[str] | None = field(
        default=None, metadata={"help": "Clients with a LoRA of a smaller rank, NAME=RANK each. Only with svd."}
    )

    @property
    def ranks(self) -> dict[str, int]:
        """`client_ranks` by client."""
        pairs = (item.rpartition("=") for item in self.client_ranks or [])
        return {name: int(rank) for name, _, rank in pairs}
