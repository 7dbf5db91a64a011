"""Each process's part of the batches that one process would read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cprec_recbole.parallel.group import part_of

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

STAND_IN = "is_stand_in"  # an attribute of a batch of which this process has no row


class PartOf:
    """A DataLoader's `collate_fn` that reads one process's part of each batch.

    Every process draws the same batches, from a generator in the same state. The parts in the order
    of the processes are the batch. A process without a row gets one of another process, marked as
    STAND_IN, that counts for nothing: every process has to take part in every step.

    Args:
        collate: reads rows by their index.
        number: which process this is, of `parts`.
        parts: how many there are.
    """

    def __init__(
        self, collate: Callable[[Sequence[int]], Interaction], number: int, parts: int
    ) -> None:
        self.collate, self.number, self.parts = collate, number, parts

    def __call__(self, index: Sequence[int]) -> Interaction:
        """This process's rows of a batch `[B]`, or one that is marked as STAND_IN."""
        mine = part_of(len(index), self.number, self.parts)
        if mine:
            return self.collate(index[mine.start : mine.stop])
        batch = self.collate(index[:1])
        setattr(batch, STAND_IN, True)
        return batch
