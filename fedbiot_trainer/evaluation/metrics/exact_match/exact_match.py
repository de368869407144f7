"""Share of predictions that equal their reference."""

import datasets
import evaluate


_DESCRIPTION = """
Share of predictions that equal their reference, white space at both ends aside. Case, punctuation and inner white space
count.
"""

_CITATION = ""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Generated texts.
    references (`list[str]`): The text that each should be.

Returns:
    `dict[str, float]`: `exact_match`, from 0 to 1.

Raises:
    ValueError: If there are no predictions.

Examples:
    >>> metric = evaluate.load("fedbiot_trainer/evaluation/metrics/exact_match")
    >>> metric.compute(predictions=[" 18", "eighteen"], references=["18", "18"])
    {'exact_match': 0.5}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        if not predictions:
            raise ValueError("`predictions` is empty, so there is no share to take. Pass at least one.")
        pairs = zip(predictions, references, strict=True)
        equal = sum(prediction.strip() == reference.strip() for prediction, reference in pairs)
        return {"exact_match": equal / len(predictions)}
