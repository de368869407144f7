"""The mean of the products B A instead of the mean of the factors, cut back to a LoRA's rank (Bai et al., 2024)."""

import math

import torch

from .interface import Aggregate
from .kept_updates import KeptUpdates
from .weighting import Weighting


A, B = "lora_A.weight", "lora_B.weight"
SMALLEST = 0.01  # length of a row of A against the longest: one of length 0 would have no gradient ever again


class ProductAverage(KeptUpdates):
    """
    The weighted mean of the clients' weight changes `B_i A_i`, of rank `sum of r_i` at most, and its best approximation
    of the LoRA's rank (the truncated singular value decomposition). Clients may have LoRAs of different ranks.

    The components of the result are sorted, the largest first: its first rows of A and columns of B are the best
    approximation of any lower rank.

    Metrics: `svd_residual`, the Frobenius norm of what was cut off against that of the mean, over all matrices.
    """

    def __init__(self, weighting: Weighting):
        super().__init__()
        self._weighting = weighting

    def combine(self, start, updates) -> Aggregate:
        shares = self._weighting.shares(updates)
        lora, cut, whole = dict(start), 0.0, 0.0
        for key in (key for key in start if key.endswith(A)):
            other = key.removesuffix(A) + B
            a = torch.cat([u.client_lora[key].double() for u in updates])
            b = torch.cat([shares[u.client] * u.client_lora[other].double() for u in updates], dim=1)
            new_a, new_b, values = truncated_product(a, b, rank=start[key].shape[0])
            lora[key], lora[other] = new_a.to(start[key].dtype), new_b.to(start[other].dtype)
            cut += values[start[key].shape[0] :].square().sum().item()
            whole += values.square().sum().item()
        return Aggregate(lora, shares, {"svd_residual": math.sqrt(cut / whole) if whole > 0 else 0.0})


def truncated_product(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The best approximation of `b @ a` by factors of a rank. The product itself is never made: with `b = Q_b R_b` and
    `a^T = Q_a R_a`, its singular values are those of the small `R_b R_a^T`.

    Args:
        a, b (`torch.Tensor`): Factors, `(k, in_features)` and `(out_features, k)`.
        rank (`int`): Rank of the result.

    Returns:
        `tuple`: Factors `(rank, in_features)` and `(out_features, rank)` with rows of A and columns of B of the same length
        (but for components that are all but zero), and all singular values, the largest first.
    """
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, values, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    kept = values[:rank]
    lengths = kept.sqrt().clamp(min=SMALLEST * kept[0].sqrt()) if kept[0] > 0 else torch.ones_like(kept)
    new_a = a.new_zeros(rank, a.shape[1])
    new_b = b.new_zeros(b.shape[0], rank)
    new_a[: len(kept)] = lengths[:, None] * (v[:rank] @ q_a.mT)
    new_b[:, : len(kept)] = (q_b @ u[:, :rank]) * (kept / lengths)
    return new_a, new_b, values
