"""Whether a setting's value is of the kind that its field says."""

import inspect
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin


WORDS = {int: "a whole number", float: "a number", bool: "True, False", str: "a string", NoneType: "None"}
SIMPLE = {int, float, bool, NoneType}


def check_kinds(config: Any, groups: Sequence[type] = ()):
    """
    Check the settings of some dataclasses with [`check_kind`]. A default is right as it is.

    Args:
        config (`Any`): Has them.
        groups (sequence of `type`, *optional*): The dataclasses. By default it is that of `config` with those that it inherits
            from, some of which are a library's: then numbers and switches are checked, which nobody else does before they are
            used, and not what may be other things than its annotation says. A switch may be `None` there.
    """
    annotations: dict[str, Any] = {}
    for group in groups or reversed(type(config).__mro__):
        annotations |= inspect.get_annotations(group)
    for name, annotation in annotations.items():
        value, kinds = getattr(config, name, MISSING), _kinds(annotation)
        if value is getattr(type(config), name, MISSING) or (value is None and bool in kinds and not groups):
            continue
        if groups or SIMPLE.issuperset(kinds):
            check_kind(name, value, annotation)


def check_kind(name: str, value: Any, annotation: Any):
    """
    Check a value. A list may be a tuple, a number be whole.

    Args:
        name (`str`): The setting's.
        value (`Any`): What it is set to.
        annotation (`Any`): Its field's: `int`, `float`, `bool`, `str`, a list of one of them, or one of these or `None`.

    Raises:
        ValueError: If it is something else: a word, half a round, "false" for `False`, not a number.
    """
    kinds = _kinds(annotation)
    if not any(_is(value, kind) for kind in kinds):
        words = sorted(map(_in_words, kinds), key=lambda word: word.startswith("a list"))
        *others, last = ", ".join(words).split(", ")
        raise ValueError(f"`{name}` is {value!r}, but it must be {', '.join(others)}{' or ' if others else ''}{last}.")


def check_model_name(name: str, argument: str):
    """Raise `FileNotFoundError` if a model's name, given as `argument`, is a path that leads nowhere. Names on the Hub pass."""
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"`{argument}` is '{name}', but there is no such folder.")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return (annotation,) if get_origin(annotation) is list else get_args(annotation) or (annotation,)


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_is(item, *get_args(kind)) for item in value)
    if isinstance(value, bool):  # which is an int to Python
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and value == value  # it is a number
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    return f"a list of which each is {WORDS[get_args(kind)[0]]}" if get_origin(kind) is list else WORDS[kind]
