"""Which rows each of several processes reads, so that together they read what one would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler

from cprec_recbole.group import share


class GlobalBatches(Sampler[list[int]]):
    """This process's part of each batch that one process alone would read.

    Every process draws the same permutation from a generator in the same state, by the sampler that
    a DataLoader would make, and takes its share of each batch: the parts of a batch, put together
    in the processes' order, are the batch. None is padded or read twice; a part may be empty.

    Args:
        n_rows: rows of the data set.
        batch_size: rows of a batch, over all processes.
        shuffle: whether the order is drawn.
        generator: what it is drawn from; the same on every process.
        number: which process this is, of `parts`.
        parts: how many there are.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        shuffle: bool,
        generator: torch.Generator,
        number: int,
        parts: int,
    ) -> None:
        rows = range(n_rows)
        order: Sampler[int] = (
            RandomSampler(rows, generator=generator) if shuffle else SequentialSampler(rows)
        )
        self.batches = BatchSampler(order, batch_size, drop_last=False)
        self.number, self.parts = number, parts

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            mine = share(len(batch), self.number, self.parts)
            yield batch[mine.start : mine.stop]

    def __len__(self) -> int:
        return len(self.batches)


class RowsOrNone:
    """A DataLoader's `collate_fn` that gives None for a batch without rows."""

    def __init__(self, collate: Callable[[Sequence[int]], Any]) -> None:
        self.collate = collate

    def __call__(self, index: Sequence[int]) -> Any:
        """The rows of an index `[B]`; None where B is 0."""
        return self.collate(index) if len(index) else None
