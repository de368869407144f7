"""Zero-shot, AdapEmu and AdapFu on held-out text."""

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def evaluate_loss(model: PreTrainedModel, dataset: Dataset, data_collator, batch_size: int) -> dict[str, float]:
    """
    Loss and token accuracy of `model`, over all tokens with a label.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]): Run in evaluation mode.
        dataset ([`~datasets.Dataset`]): Tokenized, with `input_ids` and `labels`.
        data_collator (callable): Makes padded batches of it.
        batch_size (`int`): Examples per batch.

    Returns:
        `dict[str, float]`: `loss` (nats per token) and `token_accuracy` (share of tokens that greedy decoding under
        teacher forcing gets right).
    """
    model.eval()
    total_loss = total_correct = total_tokens = 0.0
    for rows in _batches(dataset["input_ids"], batch_size):
        batch = {key: value.to(model.device) for key, value in data_collator([dataset[i] for i in rows]).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        kept = labels != -100
        logits, labels = logits[kept].float(), labels[kept]
        total_loss += F.cross_entropy(logits, labels, reduction="sum").item()
        total_correct += (logits.argmax(-1) == labels).sum().item()
        total_tokens += labels.numel()
    return {"loss": total_loss / total_tokens, "token_accuracy": total_correct / total_tokens}


@torch.no_grad()
def evaluate_exact_match(
    model: PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """
    Share of prompts whose greedy completion equals the reference, surrounding white space aside.

    Args:
        dataset ([`~datasets.Dataset`]): Prompt-completion text (plain strings).

    Returns:
        `dict[str, float]`: `exact_match`.
    """
    model.eval()
    prompts, references = dataset["prompt"], dataset["completion"]
    side, processing_class.padding_side = processing_class.padding_side, "left"
    correct = 0
    try:
        for rows in _batches(prompts, batch_size):
            batch = processing_class([prompts[i] for i in rows], padding=True, return_tensors="pt").to(model.device)
            batch.pop("token_type_ids", None)
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=processing_class.pad_token_id,
                eos_token_id=processing_class.eos_token_id,
            )
            texts = processing_class.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            correct += sum(text.strip() == references[i].strip() for text, i in zip(texts, rows, strict=True))
    finally:
        processing_class.padding_side = side
    return {"exact_match": correct / len(prompts)}


def _batches(items, batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that little is padded and memory peaks early."""
    lengths = [len(item) for item in items]
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
