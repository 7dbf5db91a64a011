"""What an original teaches the model that was compressed from it: its softmax over the items."""

from __future__ import annotations

import torch
from torch import Tensor

from cprec_recbole.compression.original import Original
from cprec_recbole.losses.cross_entropy import Strip
from cprec_recbole.losses.soft_targets import Opinion, Room, multiply, soft_cross_entropy
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.partition import PADDING
from cprec_recbole.softmax import FullSoftmax


class Teacher:
    """The original's opinion of the items as a loss, without all logits of a step at a time.

    Args:
        small: the model that learns; its `loss_memory` bounds the logits of the opinion, which are
            held beside those of its own loss where that is another (a tree, pairs).
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
        if isinstance(small.softmax, FullSoftmax) and small.loss_type != "BPR":
            opinion = self._mixed(wanted, self.partition.positions(target))
            blocks = range(len(self.partition.sizes))
            return self._learn(blocks, hidden, opinion) / max(1, len(target))
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
        return total / max(1, len(hidden))

    def _mixed(self, wanted: Tensor, place: Tensor) -> Opinion:
        """The mixture of the original's opinion and the target: both losses in one softmax."""

        def mixed(part: slice, logits: Tensor, out: Tensor) -> None:
            told_softmax(wanted[part], self.vectors, logits, out, padded=True)
            out.mul_(self.share)
            out[torch.arange(len(out), device=out.device), place[part]] += 1 - self.share

        return mixed

    def _within(self, j: int, hidden: Tensor, wanted: Tensor) -> Tensor:
        vectors = self.vectors[self.partition.starts[j] : self.partition.cutoffs[j]]
        entropy = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))

        def told(part: slice, logits: Tensor, out: Tensor) -> None:
            told_softmax(wanted[part], vectors, logits, out, padded=j == 0)
            entropy.add_(torch.special.entr(out, out=logits).sum())

        return self._learn(range(j, j + 1), hidden, told) - entropy

    def _learn(self, blocks: range, hidden: Tensor, opinion: Opinion) -> Tensor:
        """Summed cross-entropy of an opinion and one softmax over the items of some blocks."""
        learning = [self.small.softmax.table.blocks[j] for j in blocks]
        strips = [Strip(block.into_rank(hidden), block.learnt()) for block in learning]
        return soft_cross_entropy(strips, opinion, self.room, padded=blocks.start == 0)


def told_softmax(
    wanted: Tensor, vectors: Tensor, logits: Tensor, out: Tensor, *, padded: bool
) -> None:
    """The original's softmax over some items, `[m, d], [k, d] -> [m, k]` into `out`; `logits` is
    room for that. Under autocast its states may come in half precision, its table does not."""
    multiply(wanted.to(vectors.dtype), vectors, logits)
    if padded:
        logits[:, PADDING] = -torch.inf
    torch.softmax(logits, 1, out=out)
