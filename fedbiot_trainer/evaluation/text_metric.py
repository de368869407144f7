"""Metrics of generated text, as `evaluate` modules."""

import json
import re
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import evaluate
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..config.settings import EvaluationSettings
from ..shared.records import LOSS_METRICS


METRICS = Path(__file__).parent / "metrics"
SHIPPED = ("exact_match", "gsm8k_accuracy", "pass_at_k")
# Where a function that a prompt has begun ends: before the first line that is neither indented nor a closing bracket.
END_OF_FUNCTION = re.compile(r"\n(?=[^\s)\]}])")


class TextMetric:
    """
    An `evaluate` module that compares completions of a dataset's prompts with its references.

    Args:
        settings ([`EvaluationSettings`]): Names the module (`eval_metric`) and the column (`eval_reference_column`).
        dataset ([`~datasets.Dataset`]): Has prompts, or conversations that end with an answer, and references.

    Raises:
        ValueError: If the dataset lacks one of them, or the module cannot be loaded or does not give a number for the
            first example.
    """

    def __init__(self, settings: EvaluationSettings, dataset: Dataset | None):
        name, column = settings.eval_metric, settings.eval_reference_column
        if not dataset:
            raise ValueError(
                f"`eval_metric` is '{name}', but `eval_dataset` is {'None' if dataset is None else 'empty'}, so there "
                "are no prompts."
            )
        columns = dataset.column_names
        self.prompts, answers = _prompts(dataset, name)
        if column not in columns and (answers is None or column != "completion"):
            raise ValueError(
                f"`eval_reference_column` is '{column}', but `eval_dataset` has no such column (it has: "
                f"{', '.join(columns)}). Name the one with the references of `eval_metric`."
            )
        self.references: list[str] = _references(dataset, column) if column in columns else answers or []
        self.module = _load_module(name)
        self.completes_code = self.module.name == "pass_at_k" and "entry_point" in columns
        if self.completes_code:
            if not all(isinstance(prompt, str) for prompt in self.prompts):
                raise ValueError(
                    "`eval_metric` is 'pass_at_k' and `eval_dataset` has an `entry_point` column, so a prompt is the start "
                    "of a program, but its prompts are conversations. Leave that column out, or bring plain prompts."
                )
            self.references = [
                f"{tests}\ncheck({function})"
                for tests, function in zip(self.references, dataset["entry_point"], strict=True)
            ]
        first = self.prompts[0] if isinstance(self.prompts[0], str) else ""
        result = self._compute([first], self.references[:1])  # what cannot work fails now, not after training
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


def _prompts(dataset, metric) -> tuple[list[Any], list[str] | None]:
    """The prompts of a dataset, conversations as arguments of `apply_chat_template`, and the answers in these."""
    columns, first = dataset.column_names, dataset[0]
    names = ("prompt", "messages", "conversations")
    column = next((c for c in (names if "completion" in columns else (*names[1:], "prompt")) if first.get(c)), None)
    if column == "prompt" and isinstance(first["prompt"], str):
        return dataset["prompt"][:], None
    if column is None or not all(isinstance(message, dict) for message in first[column]):
        raise ValueError(
            f"`eval_metric` is '{metric}', but `eval_dataset` has no plain `prompt` column and no conversations (it has: "
            f"{', '.join(columns)}). Bring it into prompt-completion form, or leave the setting out."
        )
    talks, answers = [[_chatml(message) for message in row] for row in dataset[column]], None
    if column != "prompt":
        answers = [_answer(talk[-1:], row, column) for row, talk in enumerate(talks)]
        talks = [talk[:-1] for talk in talks]
        if [] in talks:
            raise ValueError(
                f"`eval_metric` is '{metric}', but the conversation in row {talks.index([])} of `eval_dataset` has one "
                "message, so there is nothing to answer. Leave it out."
            )
    prompts: list[dict[str, Any]] = [{"conversation": talk} for talk in talks]
    for row, prompt in zip(dataset, prompts, strict=True):
        if row.get("tools"):
            prompt["tools"] = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
        prompt |= row.get("chat_template_kwargs") or {}
    return prompts, answers


def _chatml(message: dict) -> dict:
    """A message with `role` and `content`, which some datasets call `from` and `value`."""
    return {{"from": "role", "value": "content"}.get(key, key): value for key, value in message.items()}


def _references(dataset, column) -> list:
    values = [_answer(value, row, column) for row, value in enumerate(dataset[column])]
    if None in values:
        raise ValueError(
            f"`eval_reference_column` is '{column}', which is empty in row {values.index(None)} of `eval_dataset`. Fill it, "
            "or leave the row out."
        )
    return values


def _answer(value, row, column):
    """The text of an answer that may be a list of one message."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return value
    message = _chatml(value[0])
    if len(value) > 1 or message["role"] == "user" or not isinstance(message["content"], str):
        raise ValueError(
            f"`eval_metric` needs one answer of text for each prompt, but column `{column}` of `eval_dataset` has "
            f"{len(value)} messages in row {row}, the last by '{_chatml(value[-1])['role']}'. End each conversation with "
            "one answer, or name another `eval_reference_column`."
        )
    return message["content"]


def _load_module(name):
    try:
        return evaluate.load(str(METRICS / name) if name in SHIPPED else name, keep_in_memory=True)
    except (OSError, ImportError) as error:
        raise ValueError(
            f"`eval_metric` is '{name}', which cannot be loaded ({error}). Use one of {', '.join(SHIPPED)}, or the folder "
            "of an `evaluate` module that holds a script of the same name."
        ) from error
