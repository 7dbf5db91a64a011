"""What an original teaches the model that was compressed from it: its softmax over the items."""

from __future__ import annotations

import torch
from torch import Tensor

from cprec_recbole.compression.original import Original
from cprec_recbole.losses import Workspace, cross_entropy, multiply
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.partition import PADDING
from cprec_recbole.softmax import FullSoftmax


class Teacher:
    """The original's probabilities of the items as a loss, mixed with the model's own: a `share` of
    it, from 0 to 1."""

    def __init__(self, small: CompressedRecommender, original: Original, share: float) -> None:
        self.small, self.original, self.share = small, original, share
        self.partition = small.table.partition
        self.workspace = Workspace(int(small.compression.loss_memory))
        # in the order of the blocks: one copy, and no gather a step
        self.vectors = original.table[self.partition.item_at.long()]

    def loss(self, hidden: Tensor, taught: Tensor, target: Tensor) -> Tensor:
        """The model's own loss mixed with the divergence from the original within blocks; of a flat
        softmax over all items, less the original's entropy, a constant. Of the hidden states of
        both and the next items, `[N, d], [N, d], [N] -> []`."""
        softmax = self.small.softmax
        if not isinstance(softmax, FullSoftmax) or self.small.loss_type == "BPR":
            own = self.small.position_loss(hidden, target)
            return (1 - self.share) * own + self.share * self.divergence(hidden, taught, target)
        column = self.partition.positions(target)

        def mixed(group: slice, scratch: Tensor, out: Tensor) -> None:
            teacher_softmax(taught[group], self.vectors, scratch, out, padded=True)
            out.mul_(self.share)
            out[torch.arange(len(out), device=out.device), column[group]] += 1 - self.share

        blocks = softmax.logit_blocks(hidden)
        return cross_entropy(blocks, mixed, self.workspace, padded=True) / max(1, len(target))

    def divergence(self, hidden: Tensor, taught: Tensor, target: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence from the original's softmax within the head, plus that
        within the block of each target, `[N, d], [N, d], [N] -> []`."""
        blocks = self.partition.blocks(self.partition.positions(target))
        total = self._within(0, hidden, taught)
        for j in range(1, len(self.partition.sizes)):
            rows = (blocks == j).nonzero().squeeze(1)
            if len(rows):
                total = total + self._within(j, hidden[rows], taught[rows])
        return total / max(1, len(hidden))

    def _within(self, j: int, hidden: Tensor, taught: Tensor) -> Tensor:
        vectors = self.vectors[self.partition.starts[j] : self.partition.cutoffs[j]]
        entropy = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))

        def soft(group: slice, scratch: Tensor, out: Tensor) -> None:
            teacher_softmax(taught[group], vectors, scratch, out, padded=j == 0)
            entropy.add_(torch.special.entr(out, out=scratch).sum())

        block = self.small.softmax.table.blocks[j].logit_block(hidden)
        return cross_entropy([block], soft, self.workspace, padded=j == 0) - entropy


def teacher_softmax(
    taught: Tensor, vectors: Tensor, scratch: Tensor, out: Tensor, *, padded: bool
) -> None:
    """The original's softmax over some items, `[m, d], [k, d] -> [m, k]` into `out`."""
    multiply(taught.to(vectors.dtype), vectors, scratch)  # autocast gives states half precision
    if padded:
        scratch[:, PADDING] = -torch.inf
    torch.softmax(scratch, 1, out=out)
