"""The weighted mean of changes of bounded norm (Sun et al., 2019)."""

from statistics import median

from .interface import Aggregate
from .kept_updates import KeptUpdates, changes, norm, weighted_mean
from .mixing import mixed
from .weighting import Weighting


# A mean has no middle value that would be rid of what is left of a bad update after the first: with five clients a half of
# its weight, and an eighth after the second.
MIXINGS = 2


class NormClipping(KeptUpdates):
    """
    `start + sum of w_i d_i min(1, c / |d_i|)` for the clients' changes `d_i`. It bounds what a client can do by the
    length of its change, whatever its direction.

    Args:
        weighting ([`Weighting`]): Their weights.
        clip_norm (`float`, *optional*): Largest norm `c` of a whole LoRA's change. `None`: the median of the round's.
        num_byzantine (`int`, *optional*, defaults to `1`):
            Updates that may be anything, for the mixing before ([`mixed`]). 0 is the rule as in its source.
    """

    def __init__(self, weighting: Weighting, clip_norm: float | None = None, num_byzantine: int = 1):
        super().__init__()
        self._weighting, self.clip_norm, self.num_byzantine = weighting, clip_norm, num_byzantine

    def combine(self, start, updates) -> Aggregate:
        shares = self._weighting.shares(updates)
        for _ in range(MIXINGS):
            updates = mixed(start, updates, self.num_byzantine, shares)
        changed = changes(start, updates)
        norms = {client: norm(change) for client, change in changed.items()}
        limit = median(norms.values()) if self.clip_norm is None else self.clip_norm
        factors = {client: share * min(1.0, limit / (norms[client] or 1.0)) for client, share in shares.items()}
        step = weighted_mean(changed, factors, {key: tensor.double() for key, tensor in start.items()})
        lora = {key: (tensor.double() + step[key]).to(tensor.dtype) for key, tensor in start.items()}
        clipped = sum(length > limit for length in norms.values())
        return Aggregate(
            lora, shares, {"clipped": float(clipped), "clip_norm": limit, "largest_norm": max(norms.values())}
        )
