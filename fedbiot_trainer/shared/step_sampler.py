"""Which examples are in which batch of an endless training that is cut into rounds."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """
    The batches `start`, ..., `stop - 1` of an endless pass over a dataset that is reshuffled every epoch.

    Order and batches are those of a plain `Trainer` with the same seed that runs from batch 0, so a training that is
    cut into rounds sees the data in the same order.

    Args:
        num_examples (`int`): Size of the dataset.
        batch_size (`int`): Examples per batch. The last batch of an epoch may be smaller.
        seed (`int`): Epoch `e` is shuffled with `seed + e`.
        start, stop (`int`): Range of batches.
        drop_last (`bool`, *optional*, defaults to `False`): Whether to leave out an epoch's smaller last batch.
        step (`int`, *optional*, defaults to `1`): Distance of one batch to the next, where processes share them.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        drop_last: bool = False,
        step: int = 1,
    ):
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.indices, self.drop_last = range(start, stop, step), drop_last
        batches = num_examples / batch_size
        self.batches_per_epoch = math.floor(batches) if drop_last else math.ceil(batches)
        if num_examples == 0:
            raise ValueError("There is no text to train on: none of the rows has a token that counts.")
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"`per_device_train_batch_size` is {batch_size}, but there are only {num_examples} examples and "
                "`dataloader_drop_last` is set, so there is no batch. Use smaller batches."
            )

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self) -> list[int]:
        """The examples in these batches, each once, in order."""
        return list(dict.fromkeys(row for batch in self for row in batch))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = None, []
        for index in self.indices:
            if index // self.batches_per_epoch != epoch:
                epoch = index // self.batches_per_epoch
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(self.num_examples, generator=generator).tolist()
            first = index % self.batches_per_epoch * self.batch_size
            yield order[first : first + self.batch_size]
