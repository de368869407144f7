"""Coordinate-wise median (Yin et al., 2018)."""

import torch

from .interface import Aggregate
from .kept_updates import KeptUpdates


class CoordinateMedian(KeptUpdates):
    """
    The median of the updates in each coordinate, the mean of the two in the middle where their number is even. Fewer than
    half of the clients cannot move a coordinate beyond what the others sent. No client's weight is believed.
    """

    def combine(self, start, updates) -> Aggregate:
        k = len(updates)
        lora = {}
        for key, tensor in start.items():
            ordered = torch.stack([u.client_lora[key].double() for u in updates]).sort(dim=0).values
            lora[key] = ((ordered[(k - 1) // 2] + ordered[k // 2]) / 2).to(tensor.dtype)
        return Aggregate(lora, {u.client: 1 / k for u in updates})
