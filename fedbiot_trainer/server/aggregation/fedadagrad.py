"""FedAdagrad: Adagrad at the server (Reddi et al., 2021)."""

import torch

from .server_optimizer import AdaptiveServerOptimizer


class FedAdagrad(AdaptiveServerOptimizer):
    """`v_t = v_{t-1} + d_t^2`: steps only become smaller."""

    def second_moment(self, before: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        return before + squared
