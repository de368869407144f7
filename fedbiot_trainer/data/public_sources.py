"""Which public sets a command line names, in what shares and with which templates. No library is imported for it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .names import template_columns


@dataclass(frozen=True)
class PublicSource:
    """
    One of the sets that public text is made of. The names are those of TRL's dataset mixtures.

    Attributes:
        path (`str`): The dataset.
        name (`str`, *optional*): Its configuration on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Its split.
        fraction (`float`, *optional*): Its share of all public examples, relative to the others'.
        prompt_template, completion_template (`str`, *optional*): What makes prompts and completions of its columns.
    """

    path: str
    name: str | None = None
    split: str = "train"
    fraction: float | None = None
    prompt_template: str | None = None
    completion_template: str | None = None


KEYS = [field.name for field in fields(PublicSource)]


def public_sources(args: Any) -> list[PublicSource]:
    """
    The sources in `args.public_dataset_name`: names, or mappings of a YAML with the attributes of [`PublicSource`].
    What a mapping leaves out comes from the flags for all of them.

    Raises:
        ValueError: If one of them says too little or something that is not known, or the fractions are no shares.
    """
    given, fractions = args.public_dataset_name, args.public_fractions
    entries = [] if given is None else [given] if isinstance(given, str | Mapping) else given
    sources = [_source(entry, args) for entry in entries]
    if fractions is not None:
        if len(fractions) != len(sources):
            raise ValueError(
                f"`public_fractions` has {len(fractions)} numbers, but `public_dataset_name` has {len(sources)} sets. "
                "Give one for each, in their order."
            )
        if any(source.fraction is not None for source in sources):
            raise ValueError(
                f"`public_fractions` is {fractions}, but `public_dataset_name` has a `fraction` of its own. Leave one of "
                "them out."
            )
        sources = [replace(source, fraction=fraction) for source, fraction in zip(sources, fractions, strict=True)]
    without = [source.path for source in sources if source.fraction is None]
    if without and len(without) < len(sources):
        raise ValueError(
            f"`public_dataset_name` has a `fraction` for some sets, but none for {', '.join(without)}. Give each one, or "
            "none: then all rows are taken."
        )
    for source in sources:
        fraction = source.fraction
        if fraction is not None and (isinstance(fraction, bool | str) or not 0 < fraction < float("inf")):
            raise ValueError(
                f"The fraction of '{source.path}' in the public text is {fraction!r}, but a share must be a positive "
                "number. Leave the set out instead of 0."
            )
    return sources


def _source(entry: Any, args: Any) -> PublicSource:
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or entry.keys() - set(KEYS):
        raise ValueError(
            f"`public_dataset_name` has {entry!r}, but a set is a name, or in a YAML a mapping with a `path` and any of "
            f"{', '.join(KEYS[1:])}."
        )
    prompt, completion = entry.get("prompt_template"), entry.get("completion_template")
    if (prompt is None) != (completion is None):
        raise ValueError(
            f"`prompt_template` and `completion_template` of '{entry['path']}' in `public_dataset_name` belong together: "
            "set both or neither."
        )
    for key in ("prompt_template", "completion_template"):
        template_columns(entry.get(key) or "", f"{key}` of '{entry['path']}' in `public_dataset_name")
    if prompt is None:
        entry = {**entry, "prompt_template": args.public_prompt_template}
        entry["completion_template"] = args.public_completion_template
    return PublicSource(**{"name": args.public_dataset_config, "split": args.public_dataset_split, **entry})
