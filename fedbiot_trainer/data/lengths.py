"""Sizes of tokenized text."""

from collections.abc import Iterable
from statistics import mean

from datasets import Dataset


def mean_length(texts: Iterable[Dataset]) -> float:
    """Mean number of tokens of the examples of tokenized datasets."""
    return mean(len(ids) for text in texts for ids in text["input_ids"])
