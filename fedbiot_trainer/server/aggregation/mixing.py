"""Nearest-neighbour mixing: what makes rules that look at coordinates see whole updates (Allouah et al., 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...shared.lora_state import LoraState
from ...wire.messages import ClientUpdate
from .kept_updates import changes, norm, weighted_mean


def mixed(
    start: LoraState, updates: Sequence[ClientUpdate], num_byzantine: int, shares: Mapping[str, float]
) -> list[ClientUpdate]:
    """
    Each update replaced by the mean of the `k - f` of all `k` that lie closest to it, itself among them.

    Honest updates, which are more than half, become nearly the same, and the more so the more they agree. So a rule that
    takes a middle value in each coordinate finds it near their mean, where it would be drawn towards no change by the
    coordinates in which they disagree.

    Args:
        start (`dict[str, torch.Tensor]`): The client LoRA that the clients were sent.
        updates (sequence of [`ClientUpdate`]): Theirs.
        num_byzantine (`int`):
            Updates `f` that may be anything. Nothing is mixed with 0, or where they are half of the updates or more.
        shares (`dict[str, float]`): How much each counts in a mean, by client.
    """
    if num_byzantine == 0 or len(updates) <= 2 * num_byzantine:
        return list(updates)
    distances = squared_distances(changes(start, updates))
    loras = {update.client: update.client_lora for update in updates}
    mixed_updates = []
    for update in updates:
        nearest = sorted(distances[update.client], key=distances[update.client].__getitem__)
        nearest = sorted(nearest[: len(updates) - num_byzantine])
        total = sum(shares[name] for name in nearest)
        mean = weighted_mean(loras, {name: shares[name] / total for name in nearest}, start)
        mixed_updates.append(replace(update, client_lora=mean))
    return mixed_updates


def squared_distances(changed: Mapping[str, LoraState]) -> dict[str, dict[str, float]]:
    """Between all pairs of updates, over the whole LoRA, by names. 0 from itself."""
    distances: dict[str, dict[str, float]] = {name: {name: 0.0} for name in changed}
    names = list(changed)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            apart = norm({key: tensor - changed[other][key] for key, tensor in changed[one].items()}) ** 2
            distances[one][other] = distances[other][one] = apart
    return distances
