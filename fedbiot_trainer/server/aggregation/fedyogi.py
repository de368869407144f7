"""FedYogi: Yogi at the server (Reddi et al., 2021)."""

import torch

from .server_optimizer import AdaptiveServerOptimizer


class FedYogi(AdaptiveServerOptimizer):
    """
    `v_t = v_{t-1} - (1 - beta2) d_t^2 sign(v_{t-1} - d_t^2)`: where changes become small, it forgets the large ones
    more slowly than Adam does.

    Args:
        beta2 (`float`, *optional*, defaults to `0.99`): How long squared changes count.
        **kwargs: As for [`AdaptiveServerOptimizer`].
    """

    def __init__(self, *args, beta2: float = 0.99, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta2 = beta2

    def second_moment(self, before: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        return before - (1 - self.beta2) * squared * torch.sign(before - squared)
