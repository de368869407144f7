"""FedAdam: Adam at the server (Reddi et al., 2021)."""

import torch

from .server_optimizer import DecayingServerOptimizer


class FedAdam(DecayingServerOptimizer):
    """`v_t = beta2 v_{t-1} + (1 - beta2) d_t^2`."""

    def second_moment(self, before: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        return self.beta2 * before + (1 - self.beta2) * squared
