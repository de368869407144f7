"""What the server's two trainings have in common: public text, all of whose tokens count."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..shared.compat import loss_is_scaled
from ..shared.round_trainer import RoundTrainer
from .capture import Captured, capture


class PublicTextTrainer(RoundTrainer):
    """
    A trainer on public text. Its loss is a mean over the tokens that are not padding, of all processes and whatever their
    labels. No dropout is active.
    """

    learning_rate_name = "alignment_learning_rate"
    text_name = "`public_dataset`"
    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "fedbiot"]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        loss_is_scaled(self)

    def run_student(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], layers_name: str, index: int
    ) -> tuple[Captured, Any]:
        """
        A forward pass without logits, of the model or what DDP or DeepSpeed made of it.

        Args:
            model (`nn.Module`): What [`compute_loss`] is given.
            inputs (`dict`): The batch.
            layers_name (`str`), index (`int`): The decoder layer at which hidden states are kept.

        Returns:
            `tuple`: What [`capture`] saw, and the model's outputs.
        """
        text = text_of(inputs)
        no_logits = torch.empty(0, dtype=torch.long, device=text["input_ids"].device)
        lora_model: PeftModel = self.model
        with without_dropout(model), capture(lora_model, layers_name, index) as seen:
            outputs = model(**text, use_cache=False, logits_to_keep=no_logits)
        return seen, outputs

    def mean(
        self, name: str, total: torch.Tensor, mask: torch.Tensor, num_items_in_batch: torch.Tensor | None
    ) -> torch.Tensor:
        """
        The mean over tokens, kept as a metric of this step. In a training, `num_items_in_batch` counts the tokens of all
        processes, and DDP averages the gradients: each process has its part, times their number.

        Args:
            name (`str`): Of the metric.
            total (`torch.Tensor`): Sum over the tokens of this process.
            mask (`torch.Tensor`): Which they are.
            num_items_in_batch (`torch.Tensor`, *optional*): How many there are in all processes. `None` in an evaluation.
        """
        if num_items_in_batch is None:
            value = total / mask.sum()
        else:
            value = total / num_items_in_batch * self.accelerator.num_processes
        self.record(name, value.detach())
        return value

    def _get_num_items_in_batch(self, batch_samples, device):
        num_tokens = sum(batch["attention_mask"].sum() for batch in batch_samples).to(device)
        return self.accelerator.gather(num_tokens).sum()


def text_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a batch, `(batch_size, sequence_length)`."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
