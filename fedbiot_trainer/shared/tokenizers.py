"""The tokenizer of a run, and what the models' configurations must know of it."""

import copy
import logging
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import align_special_tokens
from trl import SFTConfig


def prepare_tokenizer(processing_class: PreTrainedTokenizerBase, args: SFTConfig) -> PreTrainedTokenizerBase:
    """
    A copy of a tokenizer with the end token, padding token and chat template that `args` ask for, as
    [`~trl.SFTTrainer`] would set them on the caller's own.

    Args:
        processing_class (`PreTrainedTokenizerBase`): Stays as it is.
        args ([`~trl.SFTConfig`]): `eos_token`, `pad_token` and `chat_template_path` are read.

    Raises:
        TypeError: If it is no tokenizer.
        ValueError: If it has no token for text, no end token, lacks a token, or `chat_template_path` would add tokens.
    """
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` must be a tokenizer, got {type(processing_class).__name__}. Text is all that is trained "
            "on: of a processor, pass its `tokenizer`."
        )
    tokenizer = copy.deepcopy(processing_class)
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise ValueError(
            f"`processing_class` has no token but special ones ({len(tokenizer)}): this is what transformers makes of a folder "
            "without tokenizer files. Pass the model's tokenizer, or save it beside the model."
        )
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(
                    f"`{name}` is '{token}', which is not in the vocabulary of `processing_class`. Use one of its tokens."
                )
            setattr(tokenizer, name, token)
    if args.chat_template_path is not None:
        _take_chat_template(tokenizer, args.chat_template_path)
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise ValueError(
            "`processing_class` has no end token (its `eos_token` is None), so nothing would teach a model to stop. Name "
            "one of its tokens with `eos_token`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _is_template_file(path: str) -> bool:
    return path.endswith((".jinja", ".j2")) and Path(path).is_file()


def _take_chat_template(tokenizer, path):
    if _is_template_file(path):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    source = AutoTokenizer.from_pretrained(path)
    if source.chat_template is None:
        raise ValueError(f"`chat_template_path` is '{path}', whose tokenizer has no chat template. Name another.")
    vocabulary = tokenizer.get_vocab()
    added = [token.content for token in source.added_tokens_decoder.values() if token.content not in vocabulary]
    if added:
        raise ValueError(
            f"`chat_template_path` is '{path}', whose tokenizer has {len(added)} tokens that `processing_class` lacks "
            f"({', '.join(added[:3])}{', ...' if len(added) > 3 else ''}): they need rows in the full model's embedding. "
            "Resize the full model before you split it (`trl.clone_chat_template`, then save both), or name a .jinja file "
            "that does without them."
        )
    tokenizer.chat_template = source.chat_template
    if source.eos_token is not None:
        tokenizer.eos_token = source.eos_token


def align_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig):
    """
    Let the model's configurations name the end token of [`prepare_tokenizer`], so that generation stops there. What
    they named before stops it too, as [`~trl.SFTTrainer`] has it.
    """
    config, generation = model.config.get_text_config(), model.generation_config
    cloned = args.chat_template_path is not None and not _is_template_file(args.chat_template_path)
    if args.eos_token is not None or cloned:
        config.eos_token_id = tokenizer.eos_token_id
    if cloned and generation is not None:
        generation.eos_token_id = tokenizer.eos_token_id
    notice = logging.getLogger("transformers.trainer_utils")  # it would warn that a setting has its effect
    disabled, notice.disabled = notice.disabled, True
    try:
        align_special_tokens(model, tokenizer)
    finally:
        notice.disabled = disabled


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generation."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    return list(dict.fromkeys([tokenizer.eos_token_id, *known]))


def prompt_tokens(prompt: str | dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Tokens of a prompt to go on from: what a tokenizer puts at the start of a text, but not what it puts at its end.

    Args:
        prompt (`str` or `dict`): Text, or arguments of `apply_chat_template`: `conversation`, maybe `tools` and others.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
    """
    if not isinstance(prompt, str):
        ids = tokenizer.apply_chat_template(**prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(ids["input_ids"])
    ids, own = tokenizer(prompt)["input_ids"], tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(own) + 1):
        if own and ids[start : start + len(own)] == own:
            return ids[: start + len(own)]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [token for token in ids if token != tokenizer.eos_token_id] or [first]
