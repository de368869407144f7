"""A pass over text without gradients: loss and token accuracy."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel

from .processes import deal, summed


@torch.no_grad()
def evaluate_loss(
    model: PreTrainedModel,
    dataset: Dataset,
    data_collator,
    batch_size: int,
    accelerator: Accelerator,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """
    Loss and token accuracy of `model`, over all tokens with a label.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]): Run in evaluation mode.
        dataset ([`~datasets.Dataset`]): Tokenized, with `input_ids` and `labels`.
        data_collator (callable): Makes padded batches of it.
        batch_size (`int`): Examples per batch and process.
        accelerator (`Accelerator`): Tells the processes that share the work.
        on_progress (callable, *optional*): Called with the numbers of batches done and to do.

    Returns:
        `dict[str, float]`: `loss` (nats per token) and `token_accuracy` (share of tokens that greedy decoding under
        teacher forcing gets right).
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for rows, counts in deal(batches_by_length(dataset["input_ids"], batch_size), accelerator, on_progress):
        batch = data_collator([dataset[i] for i in rows])
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        kept = labels != -100
        logits, labels = logits[kept].float(), labels[kept]
        if counts:
            loss = F.cross_entropy(logits, labels, reduction="sum").item()
            totals += torch.tensor([loss, (logits.argmax(-1) == labels).sum().item(), labels.numel()])
    loss, correct, tokens = summed(totals, accelerator).tolist()
    return {"loss": loss / tokens, "token_accuracy": correct / tokens}


def batches_by_length(items, batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that little is padded and memory peaks early."""
    lengths = [len(item) for item in items]
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
