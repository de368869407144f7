"""How the updates of a round become one client LoRA."""

import torch

from .lora import LoraState
from .payload import ClientUpdate


class FederatedAverage:
    """
    FedAvg: the mean of the clients' LoRA tensors, weighted by the training examples that each client holds.

    The matrices A and B are averaged separately, as in the paper. Updates are added one by one and not kept, so memory
    does not grow with their number. The sums are of whole multiples of float32 tensors in float64, where they are exact
    but for values of extremely different size: the order of arrival does not matter, and equal updates come out
    unchanged.

    Attributes:
        num_examples (`int`): Training examples behind the updates so far.
    """

    def __init__(self):
        self.num_examples = 0
        self._sums: LoraState = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, update: ClientUpdate):
        """Add a client's update. All must have the same tensors."""
        for key, tensor in update.client_lora.items():
            if key not in self._sums:
                self._sums[key], self._dtypes[key] = torch.zeros(tensor.shape, dtype=torch.float64), tensor.dtype
            self._sums[key].add_(tensor.double(), alpha=update.num_examples)
        self.num_examples += update.num_examples

    def result(self) -> LoraState:
        """
        The average, in the dtype of the updates.

        Raises:
            ValueError: If nothing was added.
        """
        if self.num_examples == 0:
            raise ValueError("No update was added: there is nothing to average.")
        return {key: (total / self.num_examples).to(self._dtypes[key]) for key, total in self._sums.items()}
