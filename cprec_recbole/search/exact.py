"""Exact top-k over a factorised catalogue, most of which need not be read (CpRec, section 3.2).

A first pass in the model's precision finds every item that rounding could let into the result. The
scores of these candidates are then computed in float64, rounded to the model's precision and
sorted, equal ones by lower item id.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.search.maxima import Pairs, group_maxima
from cprec_recbole.search.table import Bounds, Rows, SearchTable
from cprec_recbole.search.topk import Excluded, TopK, not_finite

_BATCH = 256  # rows of a batch that are searched together
_SHARED = 32  # of those, rows that read the same groups
_FEW = 2**14  # logits that are looked at one by one
_NUMBERS = 2**20  # to work on at a time
_MOST = 2**21  # candidates of several rows that are kept together


class Found(NamedTuple):
    """A search's result, and what it took.

    Attributes:
        topk: the result.
        tail_share: rows of the tail that were read for a row of the batch, on average, as a share
            of all.
    """

    topk: TopK
    tail_share: float


class TooManyCandidates(Exception):
    """So many items tie for the last place that several rows' cannot be kept together."""


def search(
    table: SearchTable, hidden: Tensor, k: int, excluded: Excluded, allowed: Tensor | None = None
) -> Found:
    """The k best items of each row, among those that are not excluded.

    The items do not depend on the batch, on pieces or on an index, and neither do the scores of a
    flat softmax. A tree's may, in the last digit: their normalisers are sums in the model's
    precision, and in float64 only for rows whose order could depend on it.

    Args:
        table: the weights.
        hidden: hidden states, `[B, d]`.
        k: at most as many as each row has items left.
        excluded: what each row must not get.
        allowed: positions of the only items that rows may get, rising; None for all.

    Raises:
        CompressionError: hidden states that are not finite numbers, or scores that overflow.
    """
    if not hidden.isfinite().all():
        raise not_finite()
    rows = table.indexed if allowed is None else [block.pick(allowed) for block in table.blocks]
    most = max(1, min(_BATCH, 2**18 // k))
    parts, tail_rows = [_nothing(table, hidden, k)], 0
    for start in range(0, len(hidden), most):
        part = hidden[start : start + most].double()
        found, n_read = _best(table, rows, part, k, excluded.of_rows(start, start + most))
        parts.append(found)
        tail_rows += n_read
    topk = TopK(*(torch.cat(part) for part in zip(*parts)))
    if not topk.scores.isfinite().all():
        raise _overflow()
    n_tail = sum(block.n_items for block in table.blocks[1:])
    return Found(topk, tail_rows / max(1, len(hidden) * n_tail))


def search_one(table: SearchTable, hidden: Tensor, k: int) -> TopK | None:
    """One row in a small catalogue under a flat softmax, where a step costs as much as all of the
    arithmetic: in as few steps as it takes. None elsewhere, or where two places are too close."""
    if table.vectors is None or table.clusters is not None or len(hidden) != 1:
        return None
    hidden = hidden.double()
    basis, ranks = table.joint_basis
    queries = torch.mm(hidden, basis).to(table.dtype).split_with_sizes(ranks, 1)
    logits = [torch.mm(query, columns) for query, columns in zip(queries, table.columns)]
    best, columns = torch.cat(logits, dim=1).topk(min(k + 1, len(table.vectors)))
    values = best[0].tolist()
    gap = min(map(operator.sub, values, values[1:]), default=math.inf)
    slack = table.rounding * float(torch.linalg.vector_norm(hidden))
    if not gap > slack or not math.isfinite(sum(values)):
        return None
    columns = columns[0, :k]
    scores = (table.vectors.index_select(0, columns) * hidden).sum(1)
    return TopK(table.items.take(columns).unsqueeze(0), scores.to(table.dtype).unsqueeze(0))


def _best(
    table: SearchTable, rows: Sequence[Rows], hidden: Tensor, k: int, excluded: Excluded
) -> tuple[TopK, int]:
    """The k best of some rows of a batch, and how many rows of the tail were read."""
    try:
        part = _Part(table, rows, hidden, k, excluded)
        return part.topk(), part.tail_rows
    except TooManyCandidates:
        half, n_rows = len(hidden) // 2, len(hidden)
        first, n_first = _best(table, rows, hidden[:half], k, excluded.of_rows(0, half))
        others = excluded.of_rows(half, n_rows)
        second, n_second = _best(table, rows, hidden[half:], k, others)
        both = TopK(*(torch.cat(pair) for pair in zip(first, second)))
        return both, n_first + n_second


class _Part:
    """Some rows of a batch that are searched together.

    Arrays have the batch last. In a block, score = logit + offset. A flat softmax has no offsets; a
    tree's are minus the head's normaliser, and a cluster's log-probability minus its block's
    normaliser.

    Attributes:
        best: the k best scores so far of different items, `[k, B]`.
        slack: scores that are closer than this may be in either order, `[B]`.
        tail_rows: products of a row of the tail and a row of the batch.
    """

    def __init__(
        self,
        table: SearchTable,
        rows: Sequence[Rows],
        hidden: Tensor,
        k: int,
        excluded: Excluded,
    ) -> None:
        self.table, self.rows, self.k, self.excluded = table, rows, k, excluded
        self.hidden, self.everyone = hidden, torch.arange(len(hidden), device=hidden.device)
        self.queries = [block.query(hidden) for block in table.blocks]  # [B, r], float64
        self.is_tree = table.clusters is not None
        lengths = torch.linalg.vector_norm(hidden, dim=1)
        slack = lengths * table.rounding
        if table.clusters is not None:
            self.clusters = (hidden.unsqueeze(1) * table.clusters).sum(2)  # logits, [B, n_tails]
            self.offsets = hidden.new_zeros(len(rows), len(hidden))
            # normalisers are off by as much as logits, and by what rounding does to their sums
            scale = lengths * table.longest + math.log(table.partition.n_items)
            slack = 2 * slack + 16 * torch.finfo(table.dtype).eps * scale
        self.slack = slack.to(table.dtype)
        self.best = self.slack.new_full((k, len(hidden)), -torch.inf)
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []  # columns, positions, scores
        self.tail_rows = 0

    def topk(self) -> TopK:
        """The result."""
        for j, block in enumerate(self.rows):
            if block.groups is None or block.branches is None:
                self._read_all(j, self.everyone)
            else:
                self._read_groups(j, block, block.groups, block.branches)
        return self._sorted()

    # -- the first pass ----------------------------------------------------------------------------

    def _read_all(self, j: int, columns: Tensor) -> None:
        """Read all of a block for some rows of the batch."""
        whole = self.table.blocks[j]
        block = whole if self.rows[j].groups is not None else self.rows[j]
        query = self.queries[j][columns].to(self.table.dtype).T.contiguous()
        n_rows, rank = block.values.shape
        size = 1
        if n_rows * len(columns) > _FEW:
            # larger groups mean fewer maxima to sort, and more rows to read again for each
            size = min(round((2 * n_rows / (self.k * rank)) ** 0.5), n_rows // (8 * self.k))
        size = max(1, size)
        excluded = self._excluded_from(block, columns)
        with_sums = self.is_tree and block is whole
        maxima, log_sum = group_maxima(
            block.values, query, size, None, excluded, with_sums=with_sums
        )
        if self.is_tree:
            if block is not whole:
                log_sum = group_maxima(whole.values, query, 64, with_sums=True)[1]
            self.offsets[j, columns] = self._offset(j, columns, log_sum)
            maxima = maxima + self.offsets[j, columns].to(maxima.dtype)
        self._raise_floor(columns, maxima)
        self._keep(j, block, columns, query, maxima, size)
        self._count(j, n_rows, columns)

    def _read_groups(self, j: int, block: Rows, groups: Bounds, branches: Bounds) -> None:
        """Read those groups of a block that may hold one of the best."""
        query = block.query(self.hidden).to(self.table.dtype).T.contiguous()
        upper = branches.above(query)
        floor = self._floor(self.everyone) - self._offset_above(j, self.everyone, branches, query)
        columns = (upper.amax(0) >= floor).nonzero().squeeze(1)
        # rows that look for near items beside each other, to read the same groups
        columns = columns[upper[:, columns].argmax(0).argsort()]
        opened = [columns[:0]]
        for some in columns.split(_SHARED) if len(columns) else ():
            if self.is_tree:
                opened.append(self._may_hold_one(j, block, groups, some, query[:, some]))
            else:
                self._read_near(j, block, groups, some, query[:, some])
        if self.is_tree and len(torch.cat(opened)):
            self._read_all(j, torch.cat(opened))

    def _read_near(
        self, j: int, block: Rows, groups: Bounds, columns: Tensor, query: Tensor
    ) -> None:
        """Read the groups that may hold one of the best of any of some rows."""
        upper, floor = groups.above(query), self._floor(columns)
        lowest = torch.where(floor == -torch.inf, upper.amin(0), floor)
        # the most promising first, to raise the floor
        first = _reaching(upper, torch.maximum(floor, (3 * upper.amax(0) + lowest) / 4))
        read = [(first, self._maxima(j, block, groups, columns, query, first))]
        self._raise_floor(columns, read[0][1])
        upper[first] = torch.nan  # which reaches nothing: no group is read twice
        others = _reaching(upper, self._floor(columns))
        read.append((others, self._maxima(j, block, groups, columns, query, others)))
        self._raise_floor(columns, read[1][1])
        for chosen, maxima in read:
            self._keep(j, block, columns, query, maxima, groups.size, chosen)

    def _may_hold_one(
        self, j: int, block: Rows, groups: Bounds, columns: Tensor, query: Tensor
    ) -> Tensor:
        """Those of some rows for which a tree's block has to be read whole.

        An item's score has its block's normaliser, and that takes all of the block. What bounds say
        of the normaliser is enough to see that no item will do.
        """
        floor = self._floor(columns) - self._offset_above(j, columns, groups, query)
        chosen = _reaching(groups.above(query), floor)
        maxima = self._maxima(j, block, groups, columns, query, chosen)
        return columns[(maxima >= floor).any(0)]

    def _maxima(
        self, j: int, block: Rows, groups: Bounds, columns: Tensor, query: Tensor, chosen: Tensor
    ) -> Tensor:
        """Maxima of some groups, `[G, B]`."""
        self._count(j, len(chosen) * groups.size, columns)
        excluded = self._excluded_from(block, columns)
        return group_maxima(block.values, query, groups.size, chosen, excluded)[0]

    def _keep(
        self,
        j: int,
        block: Rows,
        columns: Tensor,
        query: Tensor,
        maxima: Tensor,
        size: int,
        groups: Tensor | None = None,
    ) -> None:
        """Collect the items of groups that may be among the best."""
        floor = self._floor(columns)
        group, column = (maxima >= floor).nonzero().unbind(1)
        if size == 1:
            self._collect(columns[column], block.positions_of(group), maxima[group, column])
            return
        group = group if groups is None else groups[group]
        slots = torch.arange(size, device=group.device)
        n_pairs = max(1, _NUMBERS // (size * len(query)))
        for some, here in zip(group.split(n_pairs), column.split(n_pairs)):
            rows = some.unsqueeze(1) * size + slots  # [P, s]
            codes = block.values[rows.clamp(max=block.n_items - 1)]
            scores = torch.bmm(codes, query.T[here].unsqueeze(2)).squeeze(2)
            if self.is_tree:
                scores += self.offsets[j, columns[here]].to(scores.dtype).unsqueeze(1)
            reaches = (scores >= floor[here].unsqueeze(1)) & (rows < block.n_items)
            positions = block.positions_of(rows[reaches])
            self._collect(columns[here[reaches.nonzero()[:, 0]]], positions, scores[reaches])

    def _collect(self, columns: Tensor, positions: Tensor, scores: Tensor) -> None:
        """Keep candidates, `[C], [C], [C]`.

        Raises:
            TooManyCandidates: more than can be kept, of more than one row.
        """
        self.found.append((columns, positions, scores))
        if len(self.hidden) > 1 and sum(len(part[0]) for part in self.found) > _MOST:
            raise TooManyCandidates

    def _floor(self, columns: Tensor) -> Tensor:
        """What an item must reach to be among the k best, but for rounding, `[B]`."""
        return self.best[-1, columns] - self.slack[columns]

    def _raise_floor(self, columns: Tensor, scores: Tensor) -> None:
        """Scores of items that none of the best so far stands for, `[m, B]`."""
        best = torch.cat([self.best[:, columns], scores])
        self.best[:, columns] = best.topk(self.k, dim=0).values

    def _excluded_from(self, block: Rows, columns: Tensor) -> Pairs | None:
        """Excluded rows of a block and which of some rows of the batch must not get them."""
        if not len(self.excluded.rows):
            return None
        number = torch.full_like(self.everyone, -1)
        number[columns] = torch.arange(len(columns), device=columns.device)
        rows, numbers = block.find(self.excluded.positions), number[self.excluded.rows]
        here = (rows >= 0) & (numbers >= 0)
        rows, order = rows[here].sort()
        return rows, numbers[here][order]

    def _count(self, j: int, n_rows: int, columns: Tensor) -> None:
        self.tail_rows += n_rows * len(columns) if j else 0

    # -- offsets of a tree -------------------------------------------------------------------------

    def _offset(self, j: int, columns: Tensor, log_sum: Tensor) -> Tensor:
        """A block's offset for some rows, given the log of its summed exponentials, `[B]`."""
        if j == 0:
            return -torch.cat([log_sum.unsqueeze(1), self.clusters[columns]], 1).logsumexp(1)
        return self.clusters[columns, j - 1] + self.offsets[0, columns] - log_sum

    def _offset_above(self, j: int, columns: Tensor, bounds: Bounds, query: Tensor) -> Tensor:
        """A number that the offset does not exceed; zeros without a tree."""
        if not self.is_tree:
            return torch.zeros_like(self.slack[columns])
        return self._offset(j, columns, bounds.log_sum_below(query)).to(query.dtype)

    def _refine_offsets(self, columns: Tensor) -> None:
        """Compute the offsets of some rows in float64, each row on its own."""
        for j, block in enumerate(self.table.blocks):
            queries = self.queries[j][columns]
            sums = [
                torch.stack([torch.logsumexp(part.double() @ query, 0) for query in queries])
                for part in block.values.split(max(1, _NUMBERS // block.values.shape[1]))
            ]
            log_sum = torch.stack(sums, 1).logsumexp(1)
            self.offsets[j, columns] = self._offset(j, columns, log_sum)

    # -- into order --------------------------------------------------------------------------------

    def _sorted(self) -> TopK:
        """The k best of the candidates."""
        columns, positions, scores = (torch.cat(part) for part in zip(*self.found))
        n_items = self.table.partition.n_items
        real = scores >= self._floor(self.everyone)[columns]
        real &= ~self.excluded.hit(columns, positions, n_items)
        columns, positions = columns[real], positions[real]
        items = self.table.items[positions - 1]
        order = items.argsort()
        columns, positions, items = columns[order], positions[order], items[order]
        counts = torch.bincount(columns, minlength=len(self.hidden))
        if int(counts.min()) < self.k:
            raise _overflow()
        logits = self._exact_logits(columns, positions)
        blocks = self.table.partition.blocks(positions)
        scores = self._with_offsets(logits, columns, blocks)
        order = _in_order(columns, scores.to(self.table.dtype))
        if self.is_tree:
            unsure = self._unsure(columns[order], blocks[order], scores[order])
            if len(unsure):
                self._refine_offsets(unsure)
                scores = self._with_offsets(logits, columns, blocks)
                order = _in_order(columns, scores.to(self.table.dtype))
        first = counts.cumsum(0) - counts
        ranks = torch.arange(self.k, device=order.device)
        best = order[first.unsqueeze(1) + ranks]
        return TopK(items[best], scores[best].to(self.table.dtype))

    def _exact_logits(self, columns: Tensor, positions: Tensor) -> Tensor:
        """Logits in float64, `[C], [C] -> [C]`. Each is a sum of its own products, so that it does
        not depend on the others."""
        if self.table.vectors is not None:
            vectors = self.table.vectors.index_select(0, positions - 1)
            return (vectors * self.hidden[columns]).sum(1)
        logits = self.hidden.new_empty(len(positions))
        for block, queries in zip(self.table.blocks, self.queries):
            rows = block.find(positions)
            here = (rows >= 0).nonzero().squeeze(1)
            for some in here.split(max(1, _NUMBERS // block.values.shape[1])):
                codes = block.values[rows[some]].double()
                logits[some] = (codes * queries[columns[some]]).sum(1)
        return logits

    def _with_offsets(self, logits: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
        return logits + self.offsets[blocks, columns] if self.is_tree else logits

    def _unsure(self, columns: Tensor, blocks: Tensor, scores: Tensor) -> Tensor:
        """Rows of the batch whose order errors of the offsets could change, given sorted candidates.

        That is between two blocks, and inside one where it decides to which numbers scores are
        rounded.
        """
        gap = (scores[:-1] - scores[1:]).abs()
        digit = torch.finfo(self.table.dtype).eps * scores[1:].abs()
        across = blocks[:-1] != blocks[1:]
        unsure = (gap > 0) & (gap <= 4 * digit) | across & (gap <= self.slack[columns[1:]])
        return columns[1:][unsure & (columns[:-1] == columns[1:])].unique()


def _in_order(columns: Tensor, scores: Tensor) -> Tensor:
    """How to sort candidates by row of the batch, then by falling score."""
    order = scores.argsort(descending=True, stable=True)
    return order[columns[order].argsort(stable=True)]


def _reaching(upper: Tensor, floor: Tensor) -> Tensor:
    """Groups with a bound that reaches the floor of some row, `[G, B], [B] -> [G']`."""
    return (upper >= floor).any(1).nonzero().squeeze(1)


def _nothing(table: SearchTable, hidden: Tensor, k: int) -> TopK:
    """The result of an empty batch."""
    scores = hidden.new_empty(0, k, dtype=table.dtype)
    return TopK(scores.long(), scores)


def _overflow() -> CompressionError:
    return CompressionError(
        "Expected scores to be finite numbers, but they overflow; the hidden states or the weights "
        "of the item table are far too large."
    )
