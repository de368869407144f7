"""How the updates of a round become the next client LoRA: one file for each rule, one interface."""

from typing import Any

from ...config.aggregation import AggregationSettings
from .capped import CappedAverage
from .fedadagrad import FedAdagrad
from .fedadam import FedAdam
from .fedavg import FederatedAverage
from .fedavgm import FedAvgM
from .fedyogi import FedYogi
from .interface import Aggregate, Aggregator
from .krum import MultiKrum
from .median import CoordinateMedian
from .norm_clipping import NormClipping
from .svd import ProductAverage
from .trimmed_mean import TrimmedMean
from .weighting import Weighting


__all__ = ["Aggregate", "Aggregator", "make_aggregator"]


def make_aggregator(settings: AggregationSettings) -> Aggregator:
    """The rule that `settings` name. Those of its settings that are `None` are its own defaults."""
    weighting = Weighting(settings.aggregation_weights, settings.max_client_share)
    mean = FederatedAverage(weighting) if weighting.max_share == 1 else CappedAverage(weighting)
    step = _given(learning_rate=settings.server_learning_rate, momentum=settings.server_momentum)
    adaptive = step | _given(tau=settings.server_tau)
    beta2 = _given(beta2=settings.server_beta2)
    byzantine = _given(num_byzantine=settings.num_byzantine)
    match settings.aggregation:
        case "fedavg":
            return mean
        case "fedavgm":
            return FedAvgM(mean, **step)
        case "fedadam":
            return FedAdam(mean, **adaptive, **beta2)
        case "fedyogi":
            return FedYogi(mean, **adaptive, **beta2)
        case "fedadagrad":
            return FedAdagrad(mean, **adaptive)
        case "median":
            return CoordinateMedian(**byzantine)
        case "trimmed_mean":
            return TrimmedMean(**_given(trim_fraction=settings.trim_fraction), **byzantine)
        case "norm_clipping":
            return NormClipping(weighting, settings.clip_norm, **byzantine)
        case "multi_krum":
            return MultiKrum(**byzantine)
        case "svd":
            return ProductAverage(weighting)
    raise ValueError(f"`aggregation` is '{settings.aggregation}', which is no rule.")


def _given(**settings: float | None) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
