"""What an original teaches the model that was compressed from it: its softmax over the items."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cprec_recbole.original import Original
from cprec_recbole.partition import PADDING
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.soft_targets import Opinion, Room, multiply
from cprec_recbole.softmax import FullSoftmax

# Of each logit within a block: the original's opinion, the model's, their logarithm, a gradient
_HELD = 4


class Teacher:
    """The original's opinion of the items as a loss, without all logits of a step at a time.

    Args:
        small: the model that learns; its `loss_memory` bounds what is held.
        original: what it was compressed from.
        share: weight of the opinion against the model's own loss, from 0 to 1.
    """

    def __init__(self, small: CompressedRecommender, original: Original, share: float) -> None:
        self.small, self.original, self.share = small, original, share
        self.partition = small.table.partition
        self.room = Room(int(small.compression.loss_memory))
        # in the order of the blocks: one copy, and no gather a step
        self.vectors = original.table[self.partition.item_at.long()]

    def loss(self, hidden: Tensor, wanted: Tensor, target: Tensor) -> Tensor:
        """The model's own loss mixed with the divergence from the original.

        Over all items where the model's softmax is flat, less the original's entropy, which is a
        constant; within blocks in a tree (`divergence`).

        Args:
            hidden: the model's hidden states, `[N, d]`.
            wanted: the original's, `[N, d]`.
            target: the items that came next, `[N]`.
        """
        small = self.small
        if isinstance(small.head, FullSoftmax) and small.loss_type != "BPR":
            mixed = self._mixed(wanted, self.partition.positions(target))
            return small.head.soft_loss(hidden, mixed, self.room) / max(1, len(target))
        own = small.position_loss(hidden, target)
        return (1 - self.share) * own + self.share * self.divergence(hidden, wanted, target)

    def divergence(self, hidden: Tensor, wanted: Tensor, target: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the original's softmax within the head, and within the
        block of each target, `[N, d], [N, d], [N] -> []`."""
        blocks = self.partition.blocks(self.partition.positions(target))
        total = self._within(0, hidden, wanted)
        for j in range(1, len(self.partition.sizes)):
            rows = (blocks == j).nonzero().squeeze(1)
            if len(rows):
                total = total + self._within(j, hidden[rows], wanted[rows])
        return total / len(hidden)

    def _mixed(self, wanted: Tensor, place: Tensor) -> Opinion:
        """The mixture of the original's opinion and the target: both losses in one softmax."""

        def mixed(part: slice, logits: Tensor, out: Tensor) -> None:
            multiply(wanted[part], self.vectors, logits)
            logits[:, PADDING] = -torch.inf
            torch.softmax(logits, 1, out=out).mul_(self.share)
            out[torch.arange(len(out), device=out.device), place[part]] += 1 - self.share

        return mixed

    def _within(self, j: int, hidden: Tensor, wanted: Tensor) -> Tensor:
        start, end = self.partition.starts[j], self.partition.cutoffs[j]
        first = PADDING + 1 if j == 0 else 0  # padding is no item

        def divergence(hidden: Tensor, wanted: Tensor) -> Tensor:
            told = (wanted @ self.vectors[start + first : end].T).log_softmax(1)
            given = self.small.head.table.blocks[j].logits(hidden)[:, first:].log_softmax(1)
            return (told.exp() * (told - given)).sum()

        return self._in_parts(divergence, end - start, hidden, wanted)

    def _in_parts(self, loss: Callable[..., Tensor], columns: int, *rows: Tensor) -> Tensor:
        """A summed loss of rows, so many at a time as `loss_memory` has room for; where that is
        not all of them, logits are made again for the gradient instead of kept."""
        memory = int(self.small.compression.loss_memory)
        size = max(1, memory // (_HELD * rows[0].element_size() * columns))
        if len(rows[0]) <= size:
            return loss(*rows)
        parts = zip(*(each.split(size) for each in rows))
        found = [
            checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
        ]
        return torch.stack(found).sum()
