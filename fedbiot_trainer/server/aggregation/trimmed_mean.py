"""Coordinate-wise trimmed mean (Yin et al., 2018)."""

import math

import torch

from .interface import Aggregate
from .kept_updates import KeptUpdates
from .mixing import mixed


class TrimmedMean(KeptUpdates):
    """
    The mean of the updates in each coordinate without its largest and smallest values. No client's weight is believed.

    Args:
        trim_fraction (`float`, *optional*, defaults to `0.2`):
            Share of the clients to leave out at each end, in `(0, 0.5)`. Their number is rounded up as long as a value
            is left: of 3 to 5 clients, 0.2 leaves out one at each end.
        num_byzantine (`int`, *optional*, defaults to `1`):
            Updates that may be anything, for the mixing before ([`mixed`]). 0 is the rule as in its source.
    """

    def __init__(self, trim_fraction: float = 0.2, num_byzantine: int = 1):
        super().__init__()
        self.trim_fraction, self.num_byzantine = trim_fraction, num_byzantine

    def combine(self, start, updates) -> Aggregate:
        k = len(updates)
        # Less a hair: 0.28 x 25 is 7, and a little more in floats.
        trimmed = min(math.ceil(self.trim_fraction * k - 1e-9), (k - 1) // 2)
        shares = {u.client: 1 / k for u in updates}
        updates = mixed(start, updates, self.num_byzantine, shares)
        lora = {}
        for key, tensor in start.items():
            ordered = torch.stack([u.client_lora[key].double() for u in updates]).sort(dim=0).values
            lora[key] = ordered[trimmed : k - trimmed].mean(dim=0).to(tensor.dtype)
        return Aggregate(lora, shares, {"trimmed_per_end": float(trimmed)})
