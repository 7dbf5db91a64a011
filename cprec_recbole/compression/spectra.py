"""What each choice of blocks and ranks would lose of a table, and the best within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import BlockPlan
from cprec_recbole.costs import TableCost
from cprec_recbole.partition import Partition

_ROWS = 2**16
_BISECTIONS = 50
_ABOVE_CHANCE = 1.3
_WORTH_A_BLOCK = 0.01  # of the table: what a plan with a block more has to lose less at the least
MOST_BLOCKS = 5  # CpRec, section 3.2: three to five are enough
# where a block may end, as shares of the items: finer where items are popular
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def block_ends(n_items: int) -> list[int]:
    """Where a block of a catalogue may end, rising; the last is `n_items`."""
    return sorted({min(n_items, max(2, round(share * n_items))) for share in _SHARES} | {n_items})


def looks_trained(table: Tensor) -> bool:
    """Whether the item vectors `[n_items, d]` have a direction stronger than random ones would.

    The strongest of n random rows is at most `(1 + sqrt(d / n))^2` times the mean (the
    Marchenko-Pastur law). Fresh models of 41 to 12,000 items reach 0.7 to 1.03 of that, models that
    were trained for some epochs 1.6 to 16.
    """
    rows = table[1:]  # padding is no item
    values = torch.linalg.eigvalsh(_gram(rows, torch.ones(len(rows), device=rows.device)))
    edge = (1 + math.sqrt(rows.shape[1] / len(rows))) ** 2
    return float(values[-1]) > _ABOVE_CHANCE * edge * float(values.mean())


def _gram(rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted second moment of rows, `[n, d], [n] -> [d, d]`, without a copy of all of them."""
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, weight in zip(rows.split(_ROWS), weights.split(_ROWS)):
        exact = part.double()
        gram += exact.T @ (exact * weight.unsqueeze(1))
    return gram


class Spectra:
    """What each possible block would lose at each rank, as a share of the whole table.

    Args:
        ends: where a block may end, rising, `[G]`; the last is `n_items`.
        lost: the share lost by the block from one end to another at each rank,
            `[G + 1, G + 1, d + 1]`; the first axis counts from the start of the catalogue.
    """

    def __init__(self, ends: Sequence[int], lost: np.ndarray) -> None:
        self.ends = (0, *ends)
        self.lost = lost
        self.dim = lost.shape[2] - 1

    @classmethod
    def of_table(
        cls,
        table: Tensor,
        counts: np.ndarray,
        ends: Sequence[int],
        importance: Tensor | None = None,
    ) -> Spectra:
        """Of a trained table `[n_items, d]`: the error of each block's best factors, weighted by
        counts and by the importance of directions as BlockEmbedding.approximate weights it."""
        order = Partition.from_counts(counts, [len(counts)]).item_at.long()
        weights = torch.from_numpy(counts).clamp(min=1).to(table.device)
        dim = table.shape[1]
        pieces = order.to(table.device).split([b - a for a, b in pairwise((0, *ends))])
        grams = [_gram(table[piece], weights[piece]) for piece in pieces]
        if importance is not None:
            root = torch.linalg.cholesky(importance)  # any root has the same eigenvalues
            grams = [root.T @ gram @ root for gram in grams]
        sums = torch.stack([torch.zeros_like(grams[0]), *grams]).cumsum(0)
        lost = np.full((len(ends) + 1, len(ends) + 1, dim + 1), np.inf)
        for a in range(len(ends)):
            for b in range(a + 1, len(ends) + 1):
                values = torch.linalg.eigvalsh(sums[b] - sums[a]).clamp(min=0)
                lost[a, b, :dim] = values.cumsum(0).flip(0).cpu().numpy()
                lost[a, b, dim] = 0.0
        return cls(ends, lost / max(float(sums[-1].trace()), 1e-300))

    @classmethod
    def of_counts(cls, counts: np.ndarray, dim: int, ends: Sequence[int]) -> Spectra:
        """Of a table that is not trained yet: items matter as often as they occur, and the i-th
        direction of a block carries 1/i of the first, about what trained tables show."""
        order = Partition.from_counts(counts, [len(counts)]).item_at.numpy()
        mass = np.concatenate([[0.0], np.maximum(counts, 1)[order].cumsum()])
        carried = 1 / np.arange(1, dim + 1)
        left = 1 - np.concatenate([[0.0], carried.cumsum() / carried.sum()])
        left[dim] = 0.0
        at = mass[[0, *ends]] / mass[-1]
        share = at[None, :] - at[:, None]
        return cls(ends, np.where((share > 0)[..., None], share[..., None] * left, np.inf))

    def best_plan(self, limit: int, cost: TableCost) -> BlockPlan | None:
        """The blocks and ranks that lose least and cost at most `limit`.

        For a price on a parameter, or on a byte, dynamic programming finds the blocks and ranks of
        least loss plus price; the price is bisected until the budget is met. That finds plans on
        the convex hull of loss and cost, so what is left of the budget is spent on higher ranks and
        on blocks in two. None if not even one block of rank 1 fits.
        """
        best = BlockPlan((1,), (self.ends[-1],), self.dim)
        if cost.of(best) > limit:
            return None
        low, high = 1e-18, 1.0  # a parameter's price in share lost
        for _ in range(_BISECTIONS):
            price = math.sqrt(low * high)
            plan = self._priced(price, cost)
            if cost.of(plan) > limit:
                low = price
                continue
            high = price
            if self.loss(plan) <= self.loss(best):
                best = plan
        best = self._filled(best, limit, cost)
        while (other := self._with_one_more(best, limit, cost)) is not None:
            best = self._filled(other, limit, cost)
        full = max(1, best.ranks.count(self.dim))  # blocks that lose nothing are one
        return BlockPlan(best.ranks[full - 1 :], best.cutoffs[full - 1 :], self.dim)

    def loss(self, plan: BlockPlan) -> float:
        """The share of the table that a plan loses."""
        places = [self.ends.index(end) for end in (0, *plan.cutoffs)]
        return float(sum(self.lost[a, b, r] for (a, b), r in zip(pairwise(places), plan.ranks)))

    def _priced(self, price: float, cost: TableCost) -> BlockPlan:
        """The plan of least loss plus price times cost; ranks never rise.

        `value[b, e, r]` is the least for the items before end e in b blocks, the last of rank r;
        `before[b, e, r]` are the end and the rank of the block before that one.
        """
        n, dim, unit = len(self.ends), self.dim, cost.unit
        ranks = np.arange(dim + 1)
        projections = np.where(ranks == dim, 0, unit.matrix(ranks, dim))
        sizes = np.subtract.outer(self.ends, self.ends).T[..., None]  # [start, end, 1]
        block = self.lost + price * cost.copies * (unit.matrix(sizes, ranks) + projections)
        block[..., 0] = np.inf  # every block has a rank
        value = np.full((MOST_BLOCKS + 1, n, dim + 1), np.inf)
        before = np.zeros((MOST_BLOCKS + 1, n, dim + 1, 2), dtype=np.int64)
        value[1, 1:] = block[0, 1:]
        for blocks in range(2, MOST_BLOCKS + 1):
            # of each end and rank: the best with that rank or a higher one, and which it is
            above = np.minimum.accumulate(value[blocks - 1][:, ::-1], axis=1)[:, ::-1]
            source_rank = np.where(value[blocks - 1] == above, ranks, dim)
            source = np.minimum.accumulate(source_rank[:, ::-1], axis=1)[:, ::-1]
            # of equal plans the one with fewer blocks
            above = above + price * (cost.each_cluster + 1)
            for end in range(2, n):
                total = above[1:end] + block[1:end, end]
                start = total.argmin(0)
                value[blocks, end] = total[start, ranks]
                before[blocks, end, :, 0] = start + 1
                before[blocks, end, :, 1] = source[start + 1, ranks]
        blocks, rank = map(int, np.unravel_index(value[:, -1].argmin(), value[:, -1].shape))
        end = n - 1
        plan_ranks: list[int] = []
        cutoffs: list[int] = []
        for left in range(blocks, 0, -1):
            plan_ranks.insert(0, rank)
            cutoffs.insert(0, self.ends[end])
            end, rank = map(int, before[left, end, rank])
        return BlockPlan(tuple(plan_ranks), tuple(cutoffs), dim)

    def _filled(self, plan: BlockPlan, limit: int, cost: TableCost) -> BlockPlan:
        """Spend what is left of the budget on the ranks that gain most for a parameter."""
        while True:
            steps = []
            for j, (rank, ceiling) in enumerate(zip(plan.ranks, (self.dim, *plan.ranks))):
                for higher in range(rank + 1, ceiling + 1):
                    other = replace(plan, ranks=(*plan.ranks[:j], higher, *plan.ranks[j + 1 :]))
                    gain = self.loss(plan) - self.loss(other)
                    if gain > 0 and cost.of(other) <= limit:
                        steps.append((gain / max(cost.of(other) - cost.of(plan), 1), other))
            if not steps:
                return plan
            plan = max(steps, key=lambda step: step[0])[1]

    def _with_one_more(self, plan: BlockPlan, limit: int, cost: TableCost) -> BlockPlan | None:
        """The plan with one of its blocks in two that loses least within the budget; None where
        none loses less."""
        if len(plan.ranks) == MOST_BLOCKS:
            return None
        best, least = None, self.loss(plan) - _WORTH_A_BLOCK
        places = [self.ends.index(end) for end in (0, *plan.cutoffs)]
        around = (self.dim, *plan.ranks, 1)

        def split(j: int, middle: int, first: int, second: int) -> BlockPlan:
            ranks = (*plan.ranks[:j], first, second, *plan.ranks[j + 1 :])
            cutoffs = (*plan.cutoffs[:j], self.ends[middle], *plan.cutoffs[j:])
            return BlockPlan(ranks, cutoffs, self.dim)

        for j, (start, end) in enumerate(pairwise(places)):
            highest, rank, lowest = around[j : j + 3]
            rest = self.loss(plan) - self.lost[start, end, rank]
            for middle, first in product(range(start + 1, end), range(lowest, highest + 1)):
                # the second rank costs more the higher it is, and loses less
                low, high = lowest - 1, first
                while low < high:
                    second = (low + high + 1) // 2
                    fits = cost.of(split(j, middle, first, second)) <= limit
                    low, high = (second, high) if fits else (low, second - 1)
                lost = rest + self.lost[start, middle, first] + self.lost[middle, end, low]
                if low >= lowest and lost < least:
                    best, least = split(j, middle, first, low), lost
        return best
