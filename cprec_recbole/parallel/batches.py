"""Each process's part of the batches that one process would read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler

from cprec_recbole.parallel.group import part_of

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

STAND_IN = "is_stand_in"  # an attribute of a batch of which this process has no row


class GlobalBatches(Sampler[list[int]]):
    """This process's part of each batch that one process alone would read.

    Every process draws the same permutation from a generator in the same state and takes its part
    of each batch. The parts in the order of the processes are the batch; a part may be empty.

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
            mine = part_of(len(batch), self.number, self.parts)
            # A process without a row reads another's twice, as a mark for PartOf.
            yield batch[mine.start : mine.stop] or batch[:1] * 2

    def __len__(self) -> int:
        return len(self.batches)


class PartOf:
    """A DataLoader's `collate_fn` for the indices that GlobalBatches gives.

    A process without a row gets one of another process, marked as STAND_IN, that counts for
    nothing: every process has to take part in every step.
    """

    def __init__(self, collate: Callable[[Sequence[int]], Interaction]) -> None:
        self.collate = collate

    def __call__(self, index: Sequence[int]) -> Interaction:
        """The rows of an index `[B]`, or one that is marked as STAND_IN."""
        if len(index) != 2 or index[0] != index[1]:  # no row is in a batch twice
            return self.collate(index)
        batch = self.collate(index[:1])
        setattr(batch, STAND_IN, True)
        return batch
