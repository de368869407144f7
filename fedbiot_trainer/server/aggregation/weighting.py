"""How much each client counts in an average."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...wire.messages import ClientUpdate


@dataclass(frozen=True)
class Weighting:
    """
    The server's rule for the weights of an average. What a client says of itself enters through it alone.

    Args:
        by (`str`, *optional*, defaults to `"examples"`):
            `"examples"`: the number of training examples that a client says it holds. `"uniform"`: all count the same.
        max_share (`float`, *optional*, defaults to `1.0`):
            Most that one client's weight can be of the sum. 1 is no cap.
    """

    by: str = "examples"
    max_share: float = 1.0

    def weight(self, update: ClientUpdate) -> int:
        """Weight of an update, before the cap."""
        return update.num_examples if self.by == "examples" else 1

    def shares(self, updates: Iterable[ClientUpdate]) -> dict[str, float]:
        """Shares of the clients, by name. They sum to 1."""
        return capped_shares({update.client: self.weight(update) for update in updates}, self.max_share)


def capped_shares(weights: Mapping[str, int], max_share: float) -> dict[str, float]:
    """
    Shares of a sum with none above `max_share`: what is cut off goes to the others, in proportion to their weights.
    Where that many cannot hold all (`1 / len(weights)` is above `max_share`), the shares are equal.
    """
    if max_share * len(weights) <= 1:
        return dict.fromkeys(weights, 1 / len(weights))
    shares: dict[str, float] = {}
    while True:  # whoever comes above the cap by what others left joins them
        free = {client: weight for client, weight in weights.items() if client not in shares}
        room, total = 1 - max_share * len(shares), sum(free.values())
        above = [client for client, weight in free.items() if room * weight / total > max_share]
        if not above:
            shares |= {client: room * weight / total for client, weight in free.items()}
            return {client: shares[client] for client in weights}
        shares |= dict.fromkeys(above, max_share)
