"""A chat template for a tokenizer whose model stays as it is."""

import copy
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def with_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """
    A copy of `tokenizer` with another chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        source (`str`): A Jinja file, or a tokenizer (folder or name) whose template and end token are taken.

    Raises:
        ValueError: If that tokenizer has tokens that the model's has not: the full model would have to grow.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if source.endswith((".jinja", ".j2")) and Path(source).is_file():
        tokenizer.chat_template = Path(source).read_text(encoding="utf-8")
        return tokenizer
    other = AutoTokenizer.from_pretrained(source)
    vocabulary = tokenizer.get_vocab()
    new = [str(token) for token in other.added_tokens_decoder.values() if str(token) not in vocabulary]
    if new:
        raise ValueError(
            f"`chat_template_path` is '{source}', whose chat template comes with tokens that the model does not have "
            f"({', '.join(new[:5])}), and the embeddings of the full model stay as they are. Add the tokens and resize "
            "the full model before it is split, or pass a `.jinja` file that does without them."
        )
    tokenizer.chat_template = other.get_chat_template()
    tokenizer.eos_token = other.eos_token
    return tokenizer
