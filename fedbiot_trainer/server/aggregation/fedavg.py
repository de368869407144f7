"""FedAvg: the weighted mean of the clients' LoRAs (McMahan et al., 2017)."""

from typing import Any

import torch

from ...shared.lora_state import LoraState
from ...wire.messages import ClientUpdate
from .interface import Aggregate, refuse_none
from .weighting import Weighting


class FederatedAverage:
    """
    The mean of the clients' LoRA tensors, weighted without a cap.

    The matrices A and B are averaged separately, as in the paper. Updates are added one by one and not kept, so memory
    does not grow with their number. The sums are of whole multiples of float32 tensors in float64, where they are exact
    but for values of extremely different size: the order of arrival does not matter, and equal updates come out
    unchanged.
    """

    def __init__(self, weighting: Weighting | None = None):
        self._weighting = weighting or Weighting()
        self._weights: dict[str, int] = {}
        self._sums: LoraState = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def begin(self, client_lora: LoraState):
        self._weights = {}
        self._sums = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in client_lora.items()}
        self._dtypes = {key: tensor.dtype for key, tensor in client_lora.items()}

    def add(self, update: ClientUpdate):
        weight = self._weighting.weight(update)
        # Not in place: a state that was taken stays as it was.
        for key, tensor in update.client_lora.items():
            self._sums[key] = self._sums[key].add(tensor.double(), alpha=weight)
        self._weights[update.client] = weight

    def finish(self) -> Aggregate:
        refuse_none(self._weights)
        total = sum(self._weights.values())
        mean = {key: (tensor / total).to(self._dtypes[key]) for key, tensor in self._sums.items()}
        shares = {client: weight / total for client, weight in self._weights.items()}
        self._weights, self._sums = {}, {}
        return Aggregate(mean, shares)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self._weights), "sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]):
        self._weights, self._sums = dict(state["weights"]), dict(state["sums"])
