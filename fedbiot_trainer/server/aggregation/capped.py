"""FedAvg with a cap on what one client can weigh."""

from .interface import Aggregate
from .kept_updates import KeptUpdates, weighted_mean
from .weighting import Weighting


class CappedAverage(KeptUpdates):
    """The weighted mean of the clients' LoRA tensors, with shares that are known once all have answered."""

    def __init__(self, weighting: Weighting):
        super().__init__()
        self._weighting = weighting

    def combine(self, start, updates) -> Aggregate:
        shares = self._weighting.shares(updates)
        return Aggregate(weighted_mean({u.client: u.client_lora for u in updates}, shares, start), shares)
