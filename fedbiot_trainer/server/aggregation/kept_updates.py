"""What the rules have in common that need all updates of a round at its end."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...shared.lora_state import LoraState
from ...wire.messages import ClientUpdate
from .interface import Aggregate, refuse_none


class KeptUpdates:
    """Keeps a round's updates. A rule says in `combine` what becomes of them."""

    def __init__(self):
        self._start: LoraState = {}
        self._updates: dict[str, ClientUpdate] = {}

    def begin(self, client_lora: LoraState):
        self._start, self._updates = client_lora, {}

    def add(self, update: ClientUpdate):
        self._updates[update.client] = update

    def finish(self) -> Aggregate:
        refuse_none(self._updates)
        # By name: sums of floats must not depend on who answered first. And none of them stays.
        updates, self._updates = [self._updates[client] for client in sorted(self._updates)], {}
        return self.combine(self._start, updates)

    def combine(self, start: LoraState, updates: Sequence[ClientUpdate]) -> Aggregate:
        """
        Make the next client LoRA.

        Args:
            start (`dict[str, torch.Tensor]`): The client LoRA that the clients were sent.
            updates (sequence of [`ClientUpdate`]): At least one, sorted by name.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": [
                {"client": u.client, "num_examples": u.num_examples, "client_lora": u.client_lora}
                for u in self._updates.values()
            ]
        }

    def load_state_dict(self, state: dict[str, Any]):
        self._updates = {
            kept["client"]: ClientUpdate(0, metrics={}, **kept)  # round and metrics are the server's matter
            for kept in state["updates"]
        }


def weighted_mean(states: Mapping[str, LoraState], shares: Mapping[str, float], like: LoraState) -> LoraState:
    """Mean of the clients' tensors by their shares, in float64 and then the dtypes of `like`."""
    zero = torch.zeros((), dtype=torch.float64)
    return {
        key: sum((share * states[client][key].double() for client, share in shares.items()), zero).to(tensor.dtype)
        for key, tensor in like.items()
    }


def changes(start: LoraState, updates: Sequence[ClientUpdate]) -> dict[str, LoraState]:
    """What each client changed, in float64."""
    return {
        u.client: {key: u.client_lora[key].double() - tensor.double() for key, tensor in start.items()}
        for u in updates
    }


def norm(state: LoraState) -> float:
    """L2 norm of a whole LoRA as one vector."""
    return torch.stack([tensor.double().square().sum() for tensor in state.values()]).sum().sqrt().item()
