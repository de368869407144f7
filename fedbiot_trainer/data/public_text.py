"""Public text: one set or a mixture, in the form of the clients' text where it can be."""

import math
from collections.abc import Sequence

from datasets import Dataset, concatenate_datasets

from ..shared.texts import is_conversational, text_columns
from .names import template_columns
from .public_sources import PublicSource
from .sources import read_dataset, to_examples


Templates = tuple[str | None, str | None]
PAIR = ("prompt", "completion")


def read_public(
    sources: Sequence[PublicSource],
    client_templates: Templates,
    clients_chat: bool,
    limit: int | None,
    seed: int,
    text_field: str = "text",
) -> tuple[Dataset, list[str]]:
    """
    Load public text and bring it into the clients' form.

    A source with templates of its own is made by them. Otherwise the clients' templates are used if it has the columns
    that they name, and it stays as it is if not. Where the clients' text is conversations, prompts and completions become
    messages, so that they go through the same chat template.

    Args:
        sources (sequence of [`PublicSource`]): At least one.
        client_templates (`tuple[str | None, str | None]`): `prompt_template` and `completion_template`.
        clients_chat (`bool`): Whether the clients' text is conversations.
        limit (`int`, *optional*): Examples at most, of all sources together.
        seed (`int`): Seed of the draw, where not all rows are taken. No row is taken twice.
        text_field (`str`, *optional*, defaults to `"text"`): Column of plain text.

    Returns:
        `tuple[Dataset, list[str]]`: The text, and what to tell of it, a line for each source.

    Raises:
        ValueError: If a template or a fraction does not fit a source, or the sources are of forms that do not mix.
    """
    loaded = [read_dataset(source.path, source.name, source.split) for source in sources]
    counts = _counts([len(dataset) for dataset in loaded], sources, limit)
    parts, lines = [], []
    for source, dataset, count in zip(sources, loaded, counts, strict=True):
        templates, note = _choose_templates(source, dataset, client_templates)
        part = to_examples(dataset, templates, count, seed, source.path, "public_prompt_template")
        part, note = _as_clients_chat(part, clients_chat, note, text_field)
        taken = f"{count:,}" if count == len(dataset) else f"{count:,} of {len(dataset):,}"
        if note is not None or len(sources) > 1:
            lines.append(f"public text: {taken} examples of {source.path}" + (f", {note}" if note else ""))
        parts.append(part)
    return (parts[0] if len(parts) == 1 else _concatenated(parts, sources, text_field)), lines


def hold_out_public(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    """
    Hold out `size` examples: what is left to align on, and these.

    Raises:
        ValueError: If nothing would be left.
    """
    if size >= len(dataset):
        raise ValueError(
            f"`public_eval_size` is {size}, but `public_dataset` has {len(dataset)} examples, of which some must be left to "
            "align on. Lower it, or pass more public text."
        )
    parts = dataset.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def _counts(lengths: Sequence[int], sources: Sequence[PublicSource], limit: int | None) -> list[int]:
    """Rows to take of each source: the most that keep the fractions, or all of them without any."""
    weights = [
        length if source.fraction is None else source.fraction for length, source in zip(lengths, sources, strict=True)
    ]
    shares = [weight / sum(weights) for weight in weights]
    total = min(length / share for length, share in zip(lengths, shares, strict=True))
    total = total if limit is None else min(total, limit)
    exact = [share * total + 1e-9 for share in shares]  # 0.29 * 100 is a little less than 29
    counts = [math.floor(rows) for rows in exact]
    by_rest = sorted(range(len(counts)), key=lambda place: counts[place] - exact[place])
    for place in by_rest[: math.floor(sum(exact)) - sum(counts)]:
        counts[place] += 1
    for source, share, count in zip(sources, shares, counts, strict=True):
        if count == 0 and limit != 0:
            raise ValueError(
                f"The public text would have no example of '{source.path}', whose share of {round(total)} is {share:.2g}. "
                "Raise its fraction or `max_public_samples`, or leave the set out."
            )
    return counts


def _choose_templates(source, dataset, client_templates) -> tuple[Templates, str | None]:
    """The templates for a source, and what to say of the choice."""
    own = (source.prompt_template, source.completion_template)
    if own[0] is not None or client_templates[0] is None:
        return own, None
    names = ("prompt_template", "completion_template")
    columns = [c for name, t in zip(names, client_templates, strict=True) for c in template_columns(t, name)]
    missing = [column for column in dict.fromkeys(columns) if column not in dataset.column_names]
    if missing:
        return (None, None), f"not in the clients' form: it has no column {', '.join(missing)} (`prompt_template`)"
    return client_templates, "in the clients' form: `prompt_template` fits its columns"


def _as_clients_chat(part, clients_chat, note, text_field) -> tuple[Dataset, str | None]:
    """Messages of prompts and completions, if the clients' text is messages."""
    try:
        columns = text_columns(part, "`public_dataset`", text_field)
    except ValueError:  # raised again with all others of its kind, when the run's texts are checked
        return part, note
    chat = is_conversational(part, columns)
    if chat == clients_chat or not columns:
        return part, note
    if columns == PAIR and clients_chat:
        return part.map(
            _messages, desc="Messages"
        ), "in the clients' form: its prompts and completions became messages"
    kinds = {True: "conversations", False: "plain text"}
    return part, f"not in the clients' form: it is {kinds[chat]}, theirs is {kinds[clients_chat]}"


def _messages(row: dict) -> dict:
    roles = zip(PAIR, ("user", "assistant"), strict=True)
    return {column: [{"role": role, "content": row[column]}] for column, role in roles}


def _concatenated(parts, sources, text_field) -> Dataset:
    """The parts in one form: plain text beside prompts and completions becomes completions of empty prompts."""
    forms, chats = [], []
    for part, source in zip(parts, sources, strict=True):
        columns = text_columns(part, f"`public_dataset_name` ('{source.path}')", text_field)
        forms.append(columns)
        chats.append(is_conversational(part, columns))
    if set(forms) == {PAIR, (text_field,)} and not any(chats):
        parts = [
            part if form == PAIR else part.map(lambda row: {"prompt": "", "completion": row[text_field]})
            for part, form in zip(parts, forms, strict=True)
        ]
        forms = [PAIR] * len(forms)
    if len(set(forms)) > 1 or len(set(chats)) > 1:
        found = "; ".join(
            f"'{source.path}' has {' and '.join(form) or 'tokens'}{' (messages)' if chat else ''}"
            for source, form, chat in zip(sources, forms, chats, strict=True)
        )
        raise ValueError(
            f"`public_dataset_name` mixes forms that cannot be one set: {found}. Bring the others into prompts and "
            "completions with `prompt_template` and `completion_template` of their own (in a YAML), or leave them out."
        )
    if forms[0]:
        kept = [*forms[0], *(("tools",) if all("tools" in part.column_names for part in parts) else ())]
        parts = [part.select_columns(kept) for part in parts]
    return concatenate_datasets(parts)
