"""Multi-Krum: the mean of the updates that lie closest to others (Blanchard et al., 2017)."""

from .interface import Aggregate
from .kept_updates import KeptUpdates, changes, weighted_mean
from .mixing import squared_distances


class MultiKrum(KeptUpdates):
    """
    Of `k` updates, the plain mean of the `k - f` with the lowest scores: the sum of squared distances, over the whole
    LoRA, to the `k - f - 2` nearest others. The source's proof needs `k >= 2 f + 3`. No client's weight is believed.

    Args:
        num_byzantine (`int`, *optional*, defaults to `1`): Updates `f` that may be anything.
    """

    def __init__(self, num_byzantine: int = 1):
        super().__init__()
        self.num_byzantine = num_byzantine

    def combine(self, start, updates) -> Aggregate:
        changed = changes(start, updates)
        names = list(changed)
        distances = squared_distances(changed)
        neighbours = max(1, len(names) - self.num_byzantine - 2)
        scores = {
            name: sum(sorted(distances[name][other] for other in names if other != name)[:neighbours])
            for name in names
        }
        selected = sorted(names, key=scores.__getitem__)[: max(1, len(names) - self.num_byzantine)]
        shares = {name: 1 / len(selected) for name in sorted(selected)}
        lora = weighted_mean({u.client: u.client_lora for u in updates}, shares, start)
        kept = [scores[name] for name in selected]
        metrics = {"selected": float(len(selected)), "worst_score": max(scores.values()), "worst_kept": max(kept)}
        return Aggregate(lora, shares, metrics)
