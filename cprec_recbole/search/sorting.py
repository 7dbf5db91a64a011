"""Top-k by scoring every item: for small catalogues, and for lists that hold much of one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from cprec_recbole.search.reading import log_sum_of
from cprec_recbole.search.settle import Rows, Weights
from cprec_recbole.search.topk import TopK

MOST_ITEMS, MOST_SCORES = 2**15, 2**18  # that are sooner sorted than searched
_SPARE = 8  # items beyond the k-th that are looked at


def is_sorted_sooner(n_items: int, n_rows: int, k: int) -> bool:
    """Whether scoring and sorting all items is quicker than a search."""
    return n_items <= MOST_ITEMS or n_items * n_rows <= MOST_SCORES or 16 * k > n_items


def sort_one(weights: Weights, hidden: Tensor, k: int) -> TopK | None:
    """One row in a small catalogue under a flat softmax, where a step costs as much as all of the
    arithmetic: in as few steps as it takes.

    None where that is not the case, or two places are too close to be sure.
    """
    if weights.clusters is not None or weights.n_items > MOST_ITEMS or len(hidden) != 1:
        return None
    basis, ranks, rounding = weights.joint_basis
    queries = torch.mm(hidden.to(basis.dtype), basis).split_with_sizes(ranks, 1)
    blocks = [torch.mm(query, strip.columns) for query, strip in zip(queries, weights.whole)]
    best, columns = torch.cat(blocks, dim=1).topk(min(k + 1, weights.n_items - 1))
    values = best[0].tolist()
    if not math.isfinite(sum(values)):
        return None
    gap = min(map(operator.sub, values, values[1:]), default=math.inf)
    if not gap > rounding * float(torch.linalg.vector_norm(hidden)):
        return None
    return TopK(weights.real_items.take(columns[:, :k]), best[:, :k])


class Sorted(Rows):
    """Some rows of a batch whose scores of all items are sorted."""

    def topk(self) -> TopK:
        """The result."""
        k, sizes = self.k, [strip.n_items for strip in self.strips]
        n_items = sum(sizes)
        scores = self.hidden.new_empty((self.n_rows, n_items), dtype=self.weights.dtype)
        blocks = torch.split_with_sizes(scores, sizes, dim=1)
        for strip, query, block in zip(self.strips, self.queries(), blocks):
            torch.mm(query, strip.columns, out=block)
        self.tail_rows = (n_items - sizes[0]) * self.n_rows
        if self.is_tree:
            self._into_log_probabilities(blocks)
        if self.barred.rows.numel():
            for strip, block in zip(self.strips, blocks):
                inside, rows = strip.find(self.barred.positions)
                block[self.barred.rows[inside], rows] = -torch.inf
        # a few more than asked for, which are enough to settle all but long ties
        best, columns = scores.topk(min(k + _SPARE, n_items), dim=1)
        result = TopK(self.items(self._positions(columns[:, :k])), best[:, :k])
        gaps = best[:, : min(k, n_items - 1)] - best[:, 1 : k + 1]
        doubt = self.doubt().unsqueeze(1)
        close = (gaps <= doubt).any(1)
        if not close.any():
            return result
        many = close & (best[:, -1:] >= best[:, k - 1 : k] - doubt).squeeze(1)
        if best.shape[1] == n_items:
            many.fill_(False)
        some = (close & ~many).nonzero().squeeze(1)
        result = TopK(result.items, result.scores.clone())
        self.settle(result, some, self._positions(columns[some]), best[some] > -torch.inf)
        self.sort_exactly(result, many.nonzero().squeeze(1))
        return result

    def _positions(self, columns: Tensor) -> Tensor:
        """Positions in popularity order of columns of all strips beside each other."""
        return columns + 1 if self.allowed is None else self.allowed[columns]

    def _into_log_probabilities(self, blocks: Sequence[Tensor]) -> None:
        everyone = torch.arange(self.n_rows, device=self.hidden.device)
        for j, block in enumerate(blocks):
            if self.allowed is None:
                log_sum = block.logsumexp(1)
            else:
                log_sum = log_sum_of(self.weights.whole[j], self.hidden)
            block += self.offset(j, everyone, log_sum).unsqueeze(1)
