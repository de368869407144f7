"""The arguments that the runner and both trainers begin with, checked before anything is done with them."""

import os
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..config import FedBiOTConfig
from ..config.kinds import check_model_name


def check_args(args: Any):
    """Raise `TypeError` if `args` are no [`FedBiOTConfig`]."""
    if not isinstance(args, FedBiOTConfig):
        raise TypeError(
            f"`args` must be a `FedBiOTConfig`, got {_described(args)}. It takes all that `trl.SFTConfig` takes, and the "
            "federation's settings."
        )


def check_callbacks(callbacks: Any):
    """Raise `TypeError` if `callbacks` are not a list of `TrainerCallback`s or of such classes."""
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"`callbacks` must be a list of `TrainerCallback`s, got {_described(callbacks)}.")
    for callback in callbacks:
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            raise TypeError(f"`callbacks` has {_described(callback)}, but each must be a `TrainerCallback`.")


def model_or_name(model: Any, *kinds: type, names: str = "a name on the Hub, a folder") -> Any:
    """
    The model, or its name: of a path, the text.

    Args:
        model (`str`, `os.PathLike` or one of `kinds`): What a caller gives. A `PeftModel` passes in any case: where it is none
            of `kinds`, it is refused later with what to do about it.
        kinds (`type`): What it may be.
        names (`str`, *optional*): What a text names.

    Raises:
        FileNotFoundError: If it is a path that leads nowhere.
        TypeError: If it is something else.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if isinstance(model, str):
        check_model_name(model, "model")
    elif not isinstance(model, (PeftModel, *kinds)):
        classes = [kind.__name__ for kind in kinds]
        *others, last = [names, *(f"{'an' if name[0] in 'AEIOU' else 'a'} `{name}`" for name in classes)]
        raise TypeError(f"`model` must be {', '.join(others)} or {last}, got {_described(model)}.")
    return model


def _described(value: Any) -> str:
    return f"the class `{value.__name__}`" if isinstance(value, type) else type(value).__name__


def prepare_for_best_model(args: FedBiOTConfig):
    """
    Do for a trainer that works alone what `TrainingArguments` does for `load_best_model_at_end`. A federated run needs no
    checkpoints for it.

    Raises:
        ValueError: If not every evaluation has a checkpoint.
    """
    if not args.load_best_model_at_end:
        return
    evaluations, checkpoints = IntervalStrategy(args.eval_strategy).value, SaveStrategy(args.save_strategy).value
    apart = evaluations == "steps" == checkpoints and args.save_steps % args.eval_steps != 0
    if evaluations == "no" or checkpoints not in (evaluations, "best") or apart:
        raise ValueError(
            f"`load_best_model_at_end` is True, but evaluations (`eval_strategy` '{evaluations}', `eval_steps` "
            f"{args.eval_steps}) and checkpoints (`save_strategy` '{checkpoints}', `save_steps` {args.save_steps}) "
            "do not come together, so the best would not be there to load. Set both alike."
        )
    args.metric_for_best_model = args.metric_for_best_model or "loss"
    if args.greater_is_better is None:
        args.greater_is_better = not args.metric_for_best_model.endswith("loss")
