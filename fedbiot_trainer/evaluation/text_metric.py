"""Metrics of generated text, as `evaluate` modules."""

import re
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import evaluate
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..config import FedBiOTConfig


METRICS = Path(__file__).parent / "metrics"
SHIPPED = ("exact_match", "gsm8k_accuracy", "pass_at_k")
LOSS_METRICS = {"loss", "token_accuracy"}
# Where a function that a prompt has begun ends: before the first line that is neither indented nor a closing bracket.
END_OF_FUNCTION = re.compile(r"\n(?=[^\s)\]}])")


class TextMetric:
    """
    An `evaluate` module that compares completions of a dataset's prompts with its references.

    Args:
        args ([`FedBiOTConfig`]): Names the module (`eval_metric`) and the column (`eval_reference_column`).
        dataset ([`~datasets.Dataset`]): Has the references, and plain strings in `prompt`.

    Raises:
        ValueError: If the dataset lacks one of them, or the module cannot be loaded or does not give a number for the
            first example.
    """

    def __init__(self, args: FedBiOTConfig, dataset: Dataset | None):
        name, column = args.eval_metric, args.eval_reference_column
        if not dataset:
            raise ValueError(
                f"`eval_metric` is '{name}', but `eval_dataset` is {'None' if dataset is None else 'empty'}, so there "
                "are no prompts."
            )
        columns = dataset.column_names
        if "prompt" not in columns or not isinstance(dataset[0]["prompt"], str):
            raise ValueError(
                f"`eval_metric` is '{name}', but `eval_dataset` has no plain `prompt` column (it has: "
                f"{', '.join(columns)}). Bring it into prompt-completion form, or leave the setting out."
            )
        if column not in columns:
            raise ValueError(
                f"`eval_reference_column` is '{column}', but `eval_dataset` has no such column (it has: "
                f"{', '.join(columns)}). Name the one with the references of `eval_metric`."
            )
        self.module = _load_module(name)
        self.prompts, self.references = dataset["prompt"][:], dataset[column][:]
        self.completes_code = self.module.name == "pass_at_k" and "entry_point" in columns
        if self.completes_code:
            self.references = [
                f"{tests}\ncheck({function})"
                for tests, function in zip(self.references, dataset["entry_point"], strict=True)
            ]
        result = self._compute(self.prompts[:1], self.references[:1])  # what cannot work fails now, not after training
        if not result:
            raise ValueError(
                f"`eval_metric` is '{name}', but for the first example it returns no number. Use a module that returns "
                "a `dict` with one."
            )

    def _compute(self, predictions, references):
        result = self.module.compute(predictions=predictions, references=references)
        return {
            key: float(value) for key, value in result.items() if isinstance(value, Real) and key not in LOSS_METRICS
        }

    def compute(self, completions: Sequence[str], accelerator: Accelerator) -> dict[str, float]:
        """
        Compute the metric, in the main process.

        Args:
            completions (sequence of `str`): One for each prompt.
            accelerator (`Accelerator`): Tells the processes, which all get the result.

        Returns:
            `dict[str, float]`: The numbers among what the module returns, but for a `loss` or `token_accuracy`.
        """
        results = [None]
        if accelerator.is_main_process:
            if self.completes_code:
                pairs = zip(self.prompts, completions, strict=True)
                completions = [prompt + END_OF_FUNCTION.split(text, maxsplit=1)[0] for prompt, text in pairs]
            results = [self._compute(completions, self.references)]
        return broadcast_object_list(results)[0]


def _load_module(name):
    try:
        return evaluate.load(str(METRICS / name) if name in SHIPPED else name, keep_in_memory=True)
    except (OSError, ImportError) as error:
        raise ValueError(
            f"`eval_metric` is '{name}', which cannot be loaded ({error}). Use one of {', '.join(SHIPPED)}, or the folder "
            "of an `evaluate` module that holds a script of the same name."
        ) from error
