"""FedAvg: the weighted mean of the clients' LoRAs (McMahan et al., 2017)."""

from typing import Any

import torch

from ...shared.lora_state import LoraState
from ...wire.messages import ClientUpdate
from .interface import Aggregate


class FederatedAverage:
    """
    The mean of the clients' LoRA tensors, weighted by the training examples that each client holds.

    The matrices A and B are averaged separately, as in the paper. Updates are added one by one and not kept, so memory
    does not grow with their number. The sums are of whole multiples of float32 tensors in float64, where they are exact
    but for values of extremely different size: the order of arrival does not matter, and equal updates come out
    unchanged.
    """

    def __init__(self):
        self._examples: dict[str, int] = {}
        self._sums: LoraState = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def begin(self, client_lora: LoraState):
        self._examples = {}
        self._sums = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in client_lora.items()}
        self._dtypes = {key: tensor.dtype for key, tensor in client_lora.items()}

    def add(self, update: ClientUpdate):
        for key, tensor in update.client_lora.items():
            self._sums[key].add_(tensor.double(), alpha=update.num_examples)
        self._examples[update.client] = update.num_examples

    def finish(self) -> Aggregate:
        total = sum(self._examples.values())
        if total == 0:
            raise ValueError("No update was added: there is nothing to average.")
        mean = {key: (tensor / total).to(self._dtypes[key]) for key, tensor in self._sums.items()}
        return Aggregate(mean, {client: examples / total for client, examples in self._examples.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"examples": self._examples, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]):
        self._examples, self._sums = state["examples"], state["sums"]
