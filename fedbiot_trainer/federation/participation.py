"""Who takes part in a round."""

import random
from dataclasses import dataclass

from ..config.settings import FederationSettings


@dataclass(frozen=True)
class Participation:
    """
    Which clients are asked in a round, and whether enough of them answered.

    Args:
        settings ([`FederationSettings`]): `fraction_train` and `min_train_clients` are read.
        seed (`int`): Seed of the draw.
    """

    settings: FederationSettings
    seed: int

    @property
    def least(self) -> int:
        """Fewest valid answers for a round to count."""
        return self.settings.min_train_clients

    def draw(self, names: list[str], server_round: int) -> list[str]:
        """Clients of a round, without replacement, in the order of `names`; the same for the same seed and round."""
        generator = random.Random(f"{self.seed}/{server_round}")
        drawn = set(generator.sample(sorted(names), self.settings.num_sampled(len(names))))
        return [name for name in names if name in drawn]

    def enough(self, valid: int) -> bool:
        """Whether a round with so many valid answers counts."""
        return valid >= self.least
