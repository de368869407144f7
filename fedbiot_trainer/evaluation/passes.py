"""Passes over held-out text: loss and token accuracy, greedy completions."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..shared.processes import deal, shards_parameters


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
    loss, correct, tokens = accelerator.reduce(totals.to(accelerator.device)).tolist()
    return {"loss": loss / tokens, "token_accuracy": correct / tokens}


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    prompts: Sequence[str],
    processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
    accelerator: Accelerator,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """
    Complete prompts greedily.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]): Run in evaluation mode.
        prompts (sequence of `str`): Texts.
        processing_class (`PreTrainedTokenizerBase`): The model's tokenizer.
        batch_size (`int`): Prompts per batch and process.
        max_new_tokens (`int`): Tokens to generate at most per prompt.
        accelerator (`Accelerator`): Tells the processes that share the work.
        on_progress (callable, *optional*): Called with the numbers of batches done and to do.

    Returns:
        `list[str]`: The completions in the order of the prompts, the same in each process.
    """
    model.eval()
    texts = []
    side, processing_class.padding_side = processing_class.padding_side, "left"
    try:
        for rows, counts in deal(batches_by_length(prompts, batch_size), accelerator, on_progress):
            batch = processing_class([prompts[i] for i in rows], padding=True, return_tensors="pt")
            batch = batch.to(accelerator.device)
            batch.pop("token_type_ids", None)
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=processing_class.pad_token_id,
                eos_token_id=processing_class.eos_token_id,
                synced_gpus=shards_parameters(accelerator),
            )
            if counts:
                # Decoded with their prompts: alone, many tokenizers drop the white space at the start of a completion.
                whole = processing_class.batch_decode(output, skip_special_tokens=True)
                starts = processing_class.batch_decode(batch["input_ids"], skip_special_tokens=True)
                texts += [(i, text[len(start) :]) for i, text, start in zip(rows, whole, starts, strict=True)]
    finally:
        processing_class.padding_side = side
    return [text for _, text in sorted(gather_object(texts))]


def batches_by_length(items, batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that little is padded and memory peaks early."""
    lengths = [len(item) for item in items]
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
