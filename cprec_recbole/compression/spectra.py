"""What each choice of blocks and ranks would lose of a table, and the best within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

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
    """Whether the item vectors `[n_items, d]` have a direction stronger than random ones would."""
    rows = table[1:]  # padding is no item
    values = torch.linalg.eigvalsh(_gram(rows, torch.ones(len(rows), device=rows.device)))
    # Marchenko and Pastur: at most so many times the mean are the strongest of random rows. Fresh
    # models of 41 to 12,000 items reach .7 to 1.03 of that, trained ones 1.6 to 16.
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
    """What each block between two of `(0, *ends)` would lose at each rank, as a share of the whole
    table: `lost` is `[start, end, rank]`, the last of the ends `n_items`."""

    def __init__(self, ends: Sequence[int], lost: np.ndarray) -> None:
        self.ends, self.lost, self.dim = (0, *ends), lost, lost.shape[2] - 1

    @classmethod
    def of_table(
        cls, table: Tensor, counts: np.ndarray, ends: Sequence[int], importance: Tensor | None
    ) -> Spectra:
        """Of a trained table `[n_items, d]`: the error of each block's best factors, weighted as
        BlockEmbedding.approximate does."""
        order = Partition.from_counts(counts, [len(counts)]).item_at.long()
        weights = torch.from_numpy(counts).clamp(min=1).to(table.device)
        dim = table.shape[1]
        pieces = order.to(table.device).split([b - a for a, b in pairwise((0, *ends))])
        grams = [_gram(table[piece], weights[piece]) for piece in pieces]
        if importance is not None:
            root = torch.linalg.cholesky(importance)  # any root has the same eigenvalues
            grams = [root.T @ gram @ root for gram in grams]
        sums = torch.stack([torch.zeros_like(grams[0]), *grams]).cumsum(0)
        lost = np.full((len(sums), len(sums), dim + 1), np.inf)
        for a, b in combinations(range(len(sums)), 2):
            values = torch.linalg.eigvalsh(sums[b] - sums[a]).clamp(min=0)
            lost[a, b, :dim] = values.cumsum(0).flip(0).cpu().numpy()
            lost[a, b, dim] = 0.0
        return cls(ends, lost / max(float(sums[-1].trace()), 1e-300))

    @classmethod
    def of_counts(cls, counts: np.ndarray, dim: int, ends: Sequence[int]) -> Spectra:
        """Of a table to be trained: items matter as often as they occur, and the i-th direction of
        a block carries 1/i of the first, about what trained tables show."""
        order = Partition.from_counts(counts, [len(counts)]).item_at.numpy()
        mass = np.concatenate([[0.0], np.maximum(counts, 1)[order].cumsum()])
        carried = 1 / np.arange(1, dim + 1)
        left = 1 - np.concatenate([[0.0], carried.cumsum() / carried.sum()])
        left[dim] = 0.0
        at = mass[[0, *ends]] / mass[-1]
        share = at[None, :] - at[:, None]
        return cls(ends, np.where((share > 0)[..., None], share[..., None] * left, np.inf))

    def best_plan(self, limit: int, cost: TableCost) -> BlockPlan | None:
        """The blocks and ranks that lose least and cost at most `limit`; None if nothing fits."""
        # Of least loss plus price, for a price on a parameter or a byte that is bisected until the
        # budget is met. Such plans are on the convex hull of loss and cost, so what is left of the
        # budget is spent on higher ranks and on blocks in two.
        best = BlockPlan((1,), (self.ends[-1],), self.dim)
        if cost.of(best) > limit:
            return None
        low, high = 1e-18, 1.0  # a parameter's price in share lost
        for _ in range(_BISECTIONS):
            price = math.sqrt(low * high)
            plan = self._priced(price, cost)
            fits = cost.of(plan) <= limit
            low, high = (low, price) if fits else (price, high)
            if fits and self.loss(plan) <= self.loss(best):
                best = plan
        other: BlockPlan | None = best
        while other is not None:
            best = self._filled(other, limit, cost)
            other = self._with_one_more(best, limit, cost)
        full = max(1, best.ranks.count(self.dim))  # blocks that lose nothing are one
        return BlockPlan(best.ranks[full - 1 :], best.cutoffs[full - 1 :], self.dim)

    def loss(self, plan: BlockPlan) -> float:
        """The share of the table that a plan loses."""
        places = pairwise(self._places(plan))
        return float(sum(self.lost[a, b, rank] for (a, b), rank in zip(places, plan.ranks)))

    def _places(self, plan: BlockPlan) -> list[int]:
        return [self.ends.index(end) for end in (0, *plan.cutoffs)]

    def _costs(self, cost: TableCost) -> np.ndarray:
        """What each possible block costs at each rank, as `lost`."""
        sizes = np.subtract.outer(self.ends, self.ends).T[..., None]
        return np.asarray(cost.block(sizes, np.arange(self.dim + 1)))

    def _priced(self, price: float, cost: TableCost) -> BlockPlan:
        """The plan of least loss plus price times cost, by dynamic programming: `value[b, e, r]` is
        the least for the items before end e in b blocks, the last of rank r; ranks never rise."""
        block = self.lost + price * self._costs(cost)
        block[..., 0] = np.inf  # every block has a rank
        another = price * (cost.each_cluster + 1)  # of equal plans the one with fewer blocks
        value = np.full((MOST_BLOCKS + 1, len(self.ends), self.dim + 1), np.inf)
        value[0, 0] = -another
        for blocks in range(MOST_BLOCKS):
            # of each end and rank: the best with that rank or a higher one
            before = np.minimum.accumulate(value[blocks, :, ::-1], axis=1)[:, ::-1] + another
            value[blocks + 1] = (before[:, None] + block).min(axis=0)
        left, rank = map(int, np.unravel_index(value[:, -1].argmin(), value[:, -1].shape))
        end = len(self.ends) - 1
        ranks: list[int] = []
        cutoffs: list[int] = []
        while left:
            ranks.insert(0, rank)
            cutoffs.insert(0, self.ends[end])
            left -= 1
            before = value[left, :, rank:].min(axis=1) + another
            end = int((before + block[:, end, rank]).argmin())
            rank += int(value[left, end, rank:].argmin())
        return BlockPlan(tuple(ranks), tuple(cutoffs), self.dim)

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
        """The plan with one of its blocks in two that loses least within the budget, if any."""
        if len(plan.ranks) == MOST_BLOCKS:
            return None
        costs, spent = self._costs(cost), cost.of(plan) + cost.each_cluster
        best, least = None, self.loss(plan) - _WORTH_A_BLOCK
        around = (self.dim, *plan.ranks, 1)
        for j, (start, end) in enumerate(pairwise(self._places(plan))):
            highest, rank, lowest = around[j : j + 3]
            # [middle, first rank, second rank]: of equals the higher second rank
            high, low = range(lowest, highest + 1), range(highest, lowest - 1, -1)
            middle, first, second = np.ix_(range(start + 1, end), high, low)
            rest = self.loss(plan) - self.lost[start, end, rank]
            lost = rest + self.lost[start, middle, first] + self.lost[middle, end, second]
            needed = spent - costs[start, end, rank]
            needed = needed + costs[start, middle, first] + costs[middle, end, second]
            lost[(needed > limit) | (second > first)] = np.inf
            if lost.min(initial=np.inf) < least:
                least = float(lost.min())
                a, b, c = map(int, np.unravel_index(lost.argmin(), lost.shape))
                ranks = (*plan.ranks[:j], high[b], low[c], *plan.ranks[j + 1 :])
                cutoffs = (*plan.cutoffs[:j], self.ends[start + 1 + a], *plan.cutoffs[j:])
                best = BlockPlan(ranks, cutoffs, self.dim)
        return best
