"""Coordinate-wise median (Yin et al., 2018)."""

import torch

from .interface import Aggregate
from .kept_updates import KeptUpdates
from .mixing import mixed


class CoordinateMedian(KeptUpdates):
    """
    The median of the updates in each coordinate, the mean of the two in the middle where their number is even. Fewer than
    half of the clients cannot move a coordinate beyond what the others sent. No client's weight is believed.

    Args:
        num_byzantine (`int`, *optional*, defaults to `1`):
            Updates that may be anything, for the mixing before ([`mixed`]). 0 is the rule as in its source.
    """

    def __init__(self, num_byzantine: int = 1):
        super().__init__()
        self.num_byzantine = num_byzantine

    def combine(self, start, updates) -> Aggregate:
        k = len(updates)
        shares = {u.client: 1 / k for u in updates}
        updates = mixed(start, updates, self.num_byzantine, shares)
        lora = {}
        for key, tensor in start.items():
            ordered = torch.stack([u.client_lora[key].double() for u in updates]).sort(dim=0).values
            lora[key] = ((ordered[(k - 1) // 2] + ordered[k // 2]) / 2).to(tensor.dtype)
        return Aggregate(lora, shares)
