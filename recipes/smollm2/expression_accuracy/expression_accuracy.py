"""Accuracy of the value of an arithmetic expression."""

import ast
import operator
import re

import datasets
import evaluate


_DESCRIPTION = """
The share of predictions whose first line is an arithmetic expression of the same value as the reference's: `8 - 3` is as
good as `10 - 5`, so that a model is judged by what it makes of a word problem and not by how well it calculates.
"""

_CITATION = """
@inproceedings{patel2021svamp,
  title = {Are {NLP} Models really able to Solve Simple Math Word Problems?},
  author = {Patel, Arkil and Bhattamishra, Satwik and Goyal, Navin},
  booktitle = {Proceedings of NAACL-HLT},
  year = {2021}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Generated texts. The first line that is not empty counts.
    references (`list[str]`): The expressions whose value each should have.

Returns:
    `dict[str, float]`: `expression_accuracy`, from 0 to 1.

Raises:
    ValueError: If there are no predictions, or a reference has no value.

Examples:
    >>> metric = evaluate.load("recipes/smollm2/expression_accuracy")
    >>> metric.compute(predictions=["3 * 4", "3 + 4", "twelve"], references=["4 * 3", "4 * 3", "4 * 3"])
    {'expression_accuracy': 0.3333333333333333}
"""

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
LONGEST = 60  # characters: longer ones are not read, as no answer has so many


def value(text: str) -> float | None:
    """What the first line of `text` evaluates to with the four operators; `None` if it is not such an expression."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if not re.fullmatch(rf"[\d\s.+\-*/()]{{1,{LONGEST}}}", line):
        return None
    try:
        return _evaluate(ast.parse(line, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, KeyError):
        return None


def _evaluate(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=float() | int() as number):
            return float(number)
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_evaluate(left), _evaluate(right))
        case _:
            raise KeyError(ast.dump(node))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExpressionAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://aclanthology.org/2021.naacl-main.168"],
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("`predictions` is empty, so there is no mean to take. Pass at least one.")
        expected = [value(reference) for reference in references]
        if None in expected:
            reference = references[expected.index(None)]
            raise ValueError(
                f"`references` has {reference!r}, which is no arithmetic expression, so nothing can equal it. Pass numbers "
                "joined by + - * / and parentheses."
            )
        got = [value(prediction) for prediction in predictions]
        right = sum(
            a is not None and abs(a - b) <= 1e-6 * max(1.0, abs(b)) for a, b in zip(got, expected, strict=True)
        )
        return {"expression_accuracy": right / len(expected)}
