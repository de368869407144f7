"""Share of right final answers on GSM8K."""

import re
from decimal import Decimal

import datasets
import evaluate


_DESCRIPTION = """
Share of generated solutions whose final answer is the number that the reference ends in (GSM8K).

A text's final answer is the first number in the line after its first `####`: what a model goes on to write, further
problems of its own for instance, does not count. A text without `####` is judged by its last number. Numbers are
compared as numbers: `1,234`, `$1234` and `1234.00` are the same. A prediction without a number is wrong.
"""

_CITATION = """
@article{cobbe2021gsm8k,
  title = {Training Verifiers to Solve Math Word Problems},
  author = {Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo and Kaiser, Lukasz
    and Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and Nakano, Reiichiro and Hesse, Christopher and
    Schulman, John},
  journal = {arXiv preprint arXiv:2110.14168},
  year = {2021}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Generated solutions.
    references (`list[str]`): Solutions of the data set (`... #### 18`), or their final answers alone.

Returns:
    `dict[str, float]`: `gsm8k_accuracy`, from 0 to 1.

Raises:
    ValueError: If there are no predictions, or a reference has no final answer.

Examples:
    >>> metric = evaluate.load("fedbiot_trainer/evaluation/metrics/gsm8k_accuracy")
    >>> metric.compute(predictions=["16 - 7 = 9, 9 * 2 = $18."], references=["She sells 9 eggs for $2. #### 18"])
    {'gsm8k_accuracy': 1.0}
"""

# A minus sign after a digit, a letter, a bracket or a percent sign takes away: `20-2` ends in 2, not in -2.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-\u2212]\$?)?"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def final_answer(text: str) -> Decimal | None:
    """The final answer of a solution, `None` if it has none."""
    _, marked, after = text.partition("####")
    if marked:
        found = NUMBER.search(after.strip().partition("\n")[0])
    else:
        found = next(reversed(list(NUMBER.finditer(text))), None)
    if found is None:
        return None
    number = Decimal(found["number"].replace(",", ""))
    return -number if found["sign"] else number


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Gsm8kAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2110.14168"],
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("`predictions` is empty, so there is no share to take. Pass at least one.")
        answers = [final_answer(reference) for reference in references]
        if None in answers:
            row = answers.index(None)
            raise ValueError(
                f"`references[{row}]` is {references[row]!r}, which has no final answer. It must have a number after "
                "`####`, or end in one."
            )
        right = sum(final_answer(text) == answer for text, answer in zip(predictions, answers, strict=True))
        return {"gsm8k_accuracy": right / len(predictions)}
