"""FedAvgM: FedAvg with momentum at the server (Hsu et al., 2019)."""

import torch

from .interface import Aggregator
from .server_optimizer import ServerOptimizer


class FedAvgM(ServerOptimizer):
    """
    `m_t = beta m_{t-1} + d_t`, step `lr m_t`. With a learning rate of 1 and no momentum it is FedAvg.

    Args:
        mean ([`Aggregator`]): Where the mean comes from.
        learning_rate (`float`, *optional*, defaults to `1.0`): The server's learning rate.
        momentum (`float`, *optional*, defaults to `0.9`): `beta`.
    """

    def __init__(self, mean: Aggregator, learning_rate: float = 1.0, momentum: float = 0.9):
        super().__init__(mean)
        self.learning_rate, self.momentum = learning_rate, momentum

    def step(self, key: str, change: torch.Tensor) -> torch.Tensor:
        self._first[key] = self.momentum * self._first.get(key, torch.zeros_like(change)) + change
        return self.learning_rate * self._first[key]
