"""Which of a run's rounds is the best."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ..config import FedBiOTConfig
from .records import LOSS_METRICS


ADAP_FU = "eval_adap_fu_"
DEFAULT = f"{ADAP_FU}loss"


@dataclass(frozen=True)
class Selection:
    """
    Compares evaluated rounds as a trainer compares its evaluations.

    Attributes:
        metric (`str`): One of the names of [`RoundRecord.scores`].
        greater_is_better (`bool`): Whether more of it is better.
    """

    metric: str = DEFAULT
    greater_is_better: bool = False

    @classmethod
    def of(cls, args: TrainingArguments) -> "Selection":
        """That of `metric_for_best_model` and `greater_is_better`: AdapFu's loss, if nothing is set or a plain `"loss"`."""
        metric = args.metric_for_best_model
        if metric in (None, "loss", "eval_loss"):
            metric = DEFAULT
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        greater = args.greater_is_better
        return cls(metric, not metric.endswith("loss") if greater is None else greater)

    def check(self, eval_sets: Iterable[str]):
        """
        Check that rounds are evaluated by this metric.

        Args:
            eval_sets (iterable of `str`): Names of the held-out sets; `""` for one without a name.

        Raises:
            ValueError: If they are not.
        """
        sets = ["", *(f"{name}_" for name in eval_sets if name)]
        names = [f"eval_{who}_{name}{m}" for name in sets for who in ("adap_fu", "adap_emu") for m in LOSS_METRICS]
        if self.metric not in names:
            raise ValueError(
                f"`metric_for_best_model` is '{self.metric}', but a round is evaluated by {', '.join(names)}. Use one of "
                "these. (What `eval_metric` measures of generated text, it measures once, at the end.)"
            )

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a round is better than the best one before it, if there is one. What is no number is not."""
        if best is None:
            best = -math.inf if self.greater_is_better else math.inf
        return value > best if self.greater_is_better else value < best


def keeps_best_round(args: FedBiOTConfig, eval_sets: Collection[str]) -> bool:
    """Whether a run ends with its best round: as it is told, or else where rounds are evaluated."""
    if args.load_best_model_at_end is not None:
        return args.load_best_model_at_end
    return args.eval_rounds > 0 and len(eval_sets) > 0


def choose_selection(
    args: FedBiOTConfig, eval_sets: Iterable[str], callbacks: Iterable[TrainerCallback | type[TrainerCallback]]
) -> Selection:
    """
    What a run compares its rounds by.

    Raises:
        ValueError: If it is to keep the best round or strength, or to stop early, and there is nothing to compare.
    """
    selection, eval_sets = Selection.of(args), list(eval_sets)
    early = EarlyStoppingCallback in [c if isinstance(c, type) else type(c) for c in callbacks]
    asks = (
        "`load_best_model_at_end` is True"
        if args.load_best_model_at_end
        else "`callbacks` has an EarlyStoppingCallback"
    )
    if args.load_best_model_at_end or early:
        if not eval_sets:
            raise ValueError(
                f"{asks}, but `eval_dataset` is None, so no round is better than another. Pass held-out text."
            )
        if args.eval_rounds == 0 and args.num_rounds > 1:
            raise ValueError(
                f"{asks}, but `eval_rounds` is 0, so only the last round is evaluated and there is none to choose from. Set "
                "`eval_rounds` to 1."
            )
    if args.plug_in_scales is not None and not eval_sets:
        raise ValueError(
            f"`plug_in_scales` is {args.plug_in_scales}, but `eval_dataset` is None, so none of them is better than another. "
            "Pass held-out text."
        )
    if eval_sets:
        selection.check(eval_sets)
    if args.plug_in_scales is not None and not selection.metric.startswith(ADAP_FU):
        raise ValueError(
            f"`plug_in_scales` is {args.plug_in_scales}, but `metric_for_best_model` is '{selection.metric}', which is the same "
            "for all of them: they are for the full model alone. Name a metric of AdapFu."
        )
    return selection
