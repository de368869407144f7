"""How the updates of a round become one client LoRA."""

import torch

from .lora import LoraState
from .payload import ClientUpdate


def federated_average(updates: list[ClientUpdate]) -> LoraState:
    """
    FedAvg: the mean of the clients' LoRA tensors, weighted by the training examples that each client holds.

    The matrices A and B are averaged separately, as in the paper. Sums run in float64 and in the order of the clients'
    names, so the result does not depend on the order in which updates arrive, and equal updates come out unchanged.

    Args:
        updates (`list[ClientUpdate]`): At least one, all with the same tensors.

    Returns:
        `dict[str, torch.Tensor]`: The averaged tensors, in the dtype of the updates.

    Raises:
        ValueError: If `updates` is empty.
    """
    if not updates:
        raise ValueError("`updates` is empty: there is nothing to average.")
    updates = sorted(updates, key=lambda update: update.client)
    total = sum(update.num_examples for update in updates)
    average = {}
    for key, tensor in updates[0].client_lora.items():
        mean = torch.zeros(tensor.shape, dtype=torch.float64)
        for update in updates:
            mean.add_(update.client_lora[key].double(), alpha=update.num_examples / total)
        average[key] = mean.to(tensor.dtype)
    return average
