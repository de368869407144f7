"""The metric of the word problems, for lm_eval."""

from pathlib import Path

import evaluate


MODULE = evaluate.load(str(Path(__file__).parents[1] / "expression_accuracy"), keep_in_memory=True)


def expression_accuracy(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 if the first line that was generated has the value of the reference, else 0.0."""
    return MODULE.compute(predictions=results, references=[doc["completion"]])
