"""What a command line cannot be, found in its first second: without torch, datasets and the libraries on them."""

from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import yaml

from ..config.checks import check_federation
from ..config.kinds import check_kind, check_model_name
from ..config.settings import GROUPS
from ..data.names import check_path, template_columns
from ..data.public_sources import public_sources


SOURCES = (
    "task", "dataset_name", "client_datasets", "eval_dataset_name", "public_dataset_name", "prompt_template",
    "completion_template", "public_prompt_template", "public_completion_template", "max_train_samples",
    "max_eval_samples", "max_public_samples", "partition_values", "eval_fraction", "dataset_streaming",
    "public_dataset_config", "public_fractions",
)  # fmt: skip
BOOLS = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
KINDS = {"dataset_streaming": bool | None, "eval_fraction": float | None, "public_fractions": list[float] | None}
LISTS = ("client_datasets", "partition_values", "public_dataset_name", "public_fractions")


def check_early(argv: list[str], are_remote: bool = False):
    """
    Check what can be checked of the flags of `fedbiot train`, or of `fedbiot serve` if clients `are_remote`, and of the YAML
    that they name. What is no flag or no value is left to the parser.

    Raises:
        FileNotFoundError: If a dataset or a model is a path that leads nowhere.
        ValueError: If a setting cannot work, or not with another.
    """
    kinds = {field.name: (field.type, field.default) for settings in GROUPS for field in fields(settings)}
    lists = {name for name, (kind, _) in kinds.items() if _item(kind)}
    given = _given(argv, {*LISTS, *lists})
    if given is None:
        return
    values = {name: _convert(given.get(name, default), kind) for name, (kind, default) in kinds.items()}
    check_federation(SimpleNamespace(**values))

    sources: dict[str, Any] = {name: given.get(name) for name in SOURCES}
    for name, kind in KINDS.items():
        sources[name] = _convert(sources[name], kind)
        check_kind(name, sources[name], kind)
    sources["public_dataset_split"] = given.get("public_dataset_split", "train")
    args = SimpleNamespace(**sources)
    check_sources(args, are_remote)
    for name in ("dataset_name", "eval_dataset_name"):
        if sources[name] is not None:
            check_path(sources[name])
    for source in public_sources(args):
        check_path(source.path)
    clients = sources["client_datasets"] or []
    for item in [clients] if isinstance(clients, str) else clients:
        check_path(item.partition("=")[2])
    model = given.get("model_name_or_path")
    if model:
        check_model_name(model, "model_name_or_path")


def _given(argv: list[str], lists: set[str]) -> dict[str, Any] | None:
    """
    Flags, those of `lists` word by word, and the values of the YAML under them; `None` if there is something else than a run
    to do.
    """
    flags: dict[str, list[str]] = {}
    name = None
    for word in argv:
        if word in ("-h", "--help"):
            return None
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name.replace("-", "_")] = [value] if value else []
        elif name is not None:
            flags[name.replace("-", "_")].append(word)
    given: dict[str, Any] = {}
    if flags.get("config"):
        given = read_yaml(flags["config"][0])
    return given | {name: words if name in lists else " ".join(words) for name, words in flags.items() if words}


def read_yaml(file: str) -> dict[str, Any]:
    """
    The settings in a YAML.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no YAML, or one of something else than settings.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"`config` is '{file}', but there is no such file.")
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`config` is '{file}', which is no YAML ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`config` is '{file}', which has no settings (`name: value` on a line each).")
    return settings


def _item(kind: Any) -> Any:
    """What a list setting is a list of; `None` for other settings."""
    return next((get_args(part)[0] for part in (kind, *get_args(kind)) if get_origin(part) is list), None)


def _convert(value: Any, kind: Any) -> Any:
    """A flag's text as what the setting is, where it can be."""
    if isinstance(value, list) and _item(kind):
        return [_convert(item, _item(kind)) for item in value]
    if not isinstance(value, str):
        return value
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        return BOOLS.get(value.lower(), value)
    for number in (int, float):
        if number in kinds:
            with suppress(ValueError):
                return number(value)
    return value


def check_sources(args: Any, are_remote: bool = False):
    """
    Check which texts a command line names. Clients that are remote have theirs.

    Raises:
        ValueError: If they are not enough, too many, or not together.
    """
    if are_remote:
        for name in ("task", "dataset_name", "client_datasets", "max_train_samples"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"`{name}` is {getattr(args, name)}, but the clients have their text at their sites. Leave it out."
                )
    for prompt, completion in (
        ("prompt_template", "completion_template"),
        ("public_prompt_template", "public_completion_template"),
    ):
        if (getattr(args, prompt) is None) != (getattr(args, completion) is None):
            raise ValueError(f"`{prompt}` and `{completion}` belong together: set both or neither.")
        for name in (prompt, completion):
            template_columns(getattr(args, name) or "", name)
    public_sources(args)
    if args.dataset_streaming:
        raise ValueError(
            "`dataset_streaming` is True, but a federated run needs to know where in the data a client is, which a "
            "stream cannot tell. Leave it out."
        )
    own = (
        "dataset_name", "client_datasets", "eval_dataset_name", "public_dataset_name", "prompt_template",
        "public_prompt_template", "max_train_samples", "max_eval_samples", "max_public_samples",
    )  # fmt: skip
    for name in own:
        if args.task is not None and getattr(args, name) is not None:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, but `task` is '{args.task}', which brings its own data. For your "
                "own, name the full model with `model_name_or_path`."
            )
    if not are_remote and args.task is None and (args.dataset_name is None) == (args.client_datasets is None):
        raise ValueError("Set one of `dataset_name` and `client_datasets`, or `task`.")
    for name in ("partition_values", "eval_fraction"):
        if getattr(args, name) is not None and args.dataset_name is None:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, but it is about `dataset_name`, which is not set. Leave it out."
            )
    if args.eval_fraction is not None:
        if not 0 < args.eval_fraction < 1:
            raise ValueError(
                f"`eval_fraction` is {args.eval_fraction}, but it is the share of examples to hold out and must be "
                "in (0, 1), 0.05 for example."
            )
        if args.eval_dataset_name is not None:
            raise ValueError(
                f"`eval_fraction` is {args.eval_fraction}, but `eval_dataset_name` is '{args.eval_dataset_name}': "
                "there can be one held-out set. Leave one of them out."
            )
