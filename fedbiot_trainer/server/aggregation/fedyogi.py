"""FedYogi: Yogi at the server (Reddi et al., 2021)."""

import torch

from .server_optimizer import DecayingServerOptimizer


class FedYogi(DecayingServerOptimizer):
    """
    `v_t = v_{t-1} - (1 - beta2) d_t^2 sign(v_{t-1} - d_t^2)`: where changes become small, it forgets the large ones
    more slowly than Adam does.
    """

    def second_moment(self, before: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        return before - (1 - self.beta2) * squared * torch.sign(before - squared)
