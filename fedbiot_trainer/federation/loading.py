"""The full model and the tokenizer of a run."""

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import FedBiOTConfig
from ..shared.precision import warn_of_slow_bf16
from ..shared.tokenizers import prepare_tokenizer
from ..wire.package import load_model
from .run_texts import RunTexts


def load_for_run(
    model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None,
    args: FedBiOTConfig,
    texts: RunTexts,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load what is given by name. The tokenizer comes first, so that text that it has no template for is refused before a
    large model is read.

    Raises:
        ValueError: If there is no tokenizer, or it does not fit the texts.
    """
    init_kwargs = args.init_kwargs()
    name = model if isinstance(model, str) else model.config.name_or_path
    if processing_class is None and name:
        shared = ("revision", "token", "trust_remote_code")
        remote = {name: value for name, value in init_kwargs.items() if name in shared and value is not None}
        try:
            processing_class = AutoTokenizer.from_pretrained(name, **remote)
        except (OSError, ValueError) as error:
            if isinstance(model, str):
                raise
            raise ValueError(
                f"`processing_class` is None, and '{name}', where `model` was loaded from, has no tokenizer ({error}). Pass it."
            ) from error
    if processing_class is None:
        raise ValueError("`processing_class` is None, and `model` was not loaded from anywhere. Pass its tokenizer.")
    processing_class = prepare_tokenizer(processing_class, args)
    texts.check_chat_template(processing_class, args.dataset_text_field)
    if isinstance(model, str):
        model = load_model(model, **init_kwargs)
    warn_of_slow_bf16(args.device, args.bf16 or model.dtype == torch.bfloat16)
    return model, processing_class
