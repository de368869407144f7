"""ROUGE-L between predictions and references."""

import re

import datasets
import evaluate


_DESCRIPTION = """
ROUGE-L: the longest common subsequence of the words of a prediction and of its reference, as an F1 score, averaged over
the pairs. Words are runs of letters, digits and underscores, in lower case; nothing is stemmed.
"""

_CITATION = """
@inproceedings{lin2004rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Generated texts.
    references (`list[str]`): The text that each should resemble.

Returns:
    `dict[str, float]`: `rouge_l`, from 0 to 1.

Raises:
    ValueError: If there are no predictions.

Examples:
    >>> metric = evaluate.load("recipes/smollm2/rouge_l")
    >>> metric.compute(predictions=["the cat sat there"], references=["The cat sat."])
    {'rouge_l': 0.8571428571428571}
"""


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0  # what stood at j - 1 before this word
        for j, other in enumerate(b, start=1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1]


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the common words of two texts; 0 where one has none."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (prediction, reference))
    return 2 * common(a, b) / (len(a) + len(b)) if a and b else 0.0


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RougeL(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://aclanthology.org/W04-1013"],
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("`predictions` is empty, so there is no mean to take. Pass at least one.")
        scores = [rouge_l(*pair) for pair in zip(predictions, references, strict=True)]
        return {"rouge_l": sum(scores) / len(scores)}
