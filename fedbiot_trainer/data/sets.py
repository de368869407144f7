"""The sets of text of a run, by the names that errors and results call them."""

from collections.abc import Mapping

from datasets import Dataset


def name_eval_sets(eval_dataset: Dataset | Mapping[str, Dataset] | None) -> dict[str, Dataset]:
    """
    The evaluation sets by name. A set that is alone has no name (an empty one); without any, there are none.

    Raises:
        ValueError: If `eval_dataset` is a dict without a set, or a name is none or that of a mean.
    """
    if eval_dataset is None:
        return {}
    if not isinstance(eval_dataset, Mapping):
        return {"": eval_dataset}
    if not eval_dataset:
        raise ValueError("`eval_dataset` is a dict without any set. Name at least one, or pass None.")
    for name in eval_dataset:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`eval_dataset` has the name {name!r}, but sets are named by text. Give it another.")
    return dict(eval_dataset)


def name_texts(eval_sets: Mapping[str, Dataset], public_dataset: Dataset | None) -> dict[str, Dataset]:
    """What is not a client's, under the names of the arguments."""
    texts = {f"`eval_dataset['{name}']`" if name else "`eval_dataset`": text for name, text in eval_sets.items()}
    return texts if public_dataset is None else texts | {"`public_dataset`": public_dataset}
