"""What a rule of aggregation is to the server."""

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...shared.lora_state import LoraState
from ...wire.messages import ClientUpdate


@dataclass
class Aggregate:
    """
    What came out of a round.

    Attributes:
        client_lora (`dict[str, torch.Tensor]`): The next round's client LoRA.
        weights (`dict[str, float]`): Share of each client that was used in it. They sum to 1.
        metrics (`dict[str, float]`): What the rule has to report.
    """

    client_lora: LoraState
    weights: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)


class Aggregator(Protocol):
    """
    A rule of aggregation. The server calls `begin`, `add` for each valid update, and `finish` in every round in which
    enough clients answered. The result must not depend on the order of the updates.
    """

    def begin(self, client_lora: LoraState):
        """Start a round from the client LoRA that its clients were sent."""

    def add(self, update: ClientUpdate):
        """Add a client's update. The server has checked it."""

    def finish(self) -> Aggregate:
        """End the round. Raises `ValueError` if nothing was added."""

    def state_dict(self) -> dict[str, Any]:
        """What the rule keeps, between rounds and within one: plain values, and tensors in nested `dict`s and lists."""

    def load_state_dict(self, state: dict[str, Any]):
        """Go on from what [`state_dict`] gave: between rounds, or in a round after its `begin`."""


def refuse_none(updates: Sized):
    """Raise `ValueError` if a round ends without an update."""
    if len(updates) == 0:
        raise ValueError("No update was added: there is nothing to average.")
