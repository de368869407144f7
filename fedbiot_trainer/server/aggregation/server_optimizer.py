"""Rules that take the mean change of a round for a gradient: FedOpt (Reddi et al., 2021, algorithm 2)."""

from dataclasses import replace
from typing import Any

import torch

from ...shared.lora_state import LoraState
from ...wire.messages import ClientUpdate
from .interface import Aggregate, Aggregator
from .kept_updates import norm


class ServerOptimizer:
    """
    Turns the change of a mean, `d_t = mean of the updates - start`, into a step of its own. It keeps moments between
    rounds.

    Args:
        mean ([`Aggregator`]): Where the mean comes from.
    """

    def __init__(self, mean: Aggregator):
        self._mean = mean
        self._start: LoraState = {}
        self._first: LoraState = {}
        self._second: LoraState = {}

    def begin(self, client_lora: LoraState):
        self._start = client_lora
        self._mean.begin(client_lora)

    def add(self, update: ClientUpdate):
        self._mean.add(update)

    def finish(self) -> Aggregate:
        mean = self._mean.finish()
        start = {key: tensor.double() for key, tensor in self._start.items()}
        change = {key: mean.client_lora[key].double() - tensor for key, tensor in start.items()}
        step = {key: self.step(key, tensor) for key, tensor in change.items()}
        lora = {key: (start[key] + step[key]).to(tensor.dtype) for key, tensor in self._start.items()}
        return replace(mean, client_lora=lora, metrics={"change_norm": norm(change), "step_norm": norm(step)})

    def step(self, key: str, change: torch.Tensor) -> torch.Tensor:
        """The server's step for one tensor of the LoRA, in float64."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean.state_dict(), "first": dict(self._first), "second": dict(self._second)}

    def load_state_dict(self, state: dict[str, Any]):
        self._mean.load_state_dict(state["mean"])
        self._first, self._second = dict(state["first"]), dict(state["second"])


class AdaptiveServerOptimizer(ServerOptimizer):
    """
    `m_t = beta1 m_{t-1} + (1 - beta1) d_t`, step `lr m_t / (sqrt(v_t) + tau)`, from `m_0 = 0` and `v_0 = tau^2`. A rule
    says in `second_moment` what `v_t` is.

    Args:
        mean ([`Aggregator`]): Where the mean comes from.
        learning_rate (`float`, *optional*, defaults to `0.01`): The server's learning rate.
        momentum (`float`, *optional*, defaults to `0.9`): `beta1`.
        tau (`float`, *optional*, defaults to `0.001`): How adaptive it is: coordinates that change by less count less.
    """

    def __init__(self, mean: Aggregator, learning_rate: float = 0.01, momentum: float = 0.9, tau: float = 1e-3):
        super().__init__(mean)
        self.learning_rate, self.momentum, self.tau = learning_rate, momentum, tau

    def step(self, key: str, change: torch.Tensor) -> torch.Tensor:
        first = self._first.get(key, torch.zeros_like(change))
        second = self._second.get(key, torch.full_like(change, self.tau**2))
        self._first[key] = self.momentum * first + (1 - self.momentum) * change
        self._second[key] = self.second_moment(second, change.square())
        return self.learning_rate * self._first[key] / (self._second[key].sqrt() + self.tau)

    def second_moment(self, before: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        """`v_t` of `v_{t-1}` and `d_t^2`."""
        raise NotImplementedError


class DecayingServerOptimizer(AdaptiveServerOptimizer):
    """
    An adaptive rule that forgets the changes of rounds long ago.

    Args:
        beta2 (`float`, *optional*, defaults to `0.99`): How long squared changes count.
        *args, **kwargs: As for [`AdaptiveServerOptimizer`].
    """

    def __init__(self, *args, beta2: float = 0.99, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta2 = beta2
