"""Greedy completions of held-out prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..shared.processes import deal, shards_parameters
from ..shared.text_loss import batches_by_length
from ..shared.tokenizers import end_tokens, prompt_tokens


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    prompts: Sequence[str | dict],
    processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
    accelerator: Accelerator,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """
    Complete prompts greedily, whatever the model's generation config says, until one of its end tokens or the
    tokenizer's.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]): Run in evaluation mode.
        prompts (sequence of `str` or `dict`): Texts, or conversations as arguments of `apply_chat_template`.
        processing_class (`PreTrainedTokenizerBase`): The model's tokenizer.
        batch_size (`int`): Prompts per batch and process.
        max_new_tokens (`int`): Tokens to generate at most per prompt.
        accelerator (`Accelerator`): Tells the processes that share the work.
        on_progress (callable, *optional*): Called with the numbers of batches done and to do.

    Returns:
        `list[str]`: The completions in the order of the prompts, the same in each process.
    """
    model.eval()
    texts, ends = [], end_tokens(model, processing_class)
    ids = [prompt_tokens(prompt, processing_class) for prompt in prompts]
    pad = processing_class.eos_token_id if processing_class.pad_token_id is None else processing_class.pad_token_id
    with _greedy(model, max_new_tokens, ends, pad):
        for rows, counts in deal(batches_by_length(ids, batch_size), accelerator, on_progress):
            batch = _padded_left([ids[row] for row in rows], pad).to(accelerator.device)
            mask = _padded_left([[1] * len(ids[row]) for row in rows], 0).to(accelerator.device)
            output = model.generate(input_ids=batch, attention_mask=mask, synced_gpus=shards_parameters(accelerator))
            if counts:
                new = output[:, batch.shape[1] :].tolist()
                texts += [
                    (row, _decode_end(ids[row], _up_to(tokens, ends), processing_class))
                    for row, tokens in zip(rows, new, strict=True)
                ]
    return [text for _, text in sorted(gather_object(texts))]


@contextmanager
def _greedy(model, max_new_tokens, ends, pad) -> Iterator[None]:
    """A model's own generation config would fill what is not set: beams, penalties, forced tokens."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad
    )
    try:
        yield
    finally:
        model.generation_config = own


def _padded_left(rows, value) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])


def _up_to(tokens, ends) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _decode_end(prompt, new, processing_class) -> str:
    """Decoded with its prompt: alone, many tokenizers drop the white space at the start of a completion."""
    whole, start = (
        processing_class.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt + new, prompt)
    )
    return whole[len(start) :]
