"""FedAdam: Adam at the server (Reddi et al., 2021)."""

import torch

from .server_optimizer import AdaptiveServerOptimizer


class FedAdam(AdaptiveServerOptimizer):
    """
    `v_t = beta2 v_{t-1} + (1 - beta2) d_t^2`.

    Args:
        beta2 (`float`, *optional*, defaults to `0.99`): How long squared changes count.
        **kwargs: As for [`AdaptiveServerOptimizer`].
    """

    def __init__(self, *args, beta2: float = 0.99, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta2 = beta2

    def second_moment(self, before: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        return self.beta2 * before + (1 - self.beta2) * squared
