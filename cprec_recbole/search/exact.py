"""Exact top-k over a factorised catalogue, most of which need not be read (CpRec, section 3.2).

A first pass in the model's precision finds every item that rounding could let into the result.
Scores of these candidates are computed in float64, each from its own products alone, rounded to the
model's precision and sorted, equal ones by lower item id.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.search.maxima import group_maxima
from cprec_recbole.search.table import Bounds, Rows, SearchTable
from cprec_recbole.search.topk import Limits, TopK

_BATCH = 256  # rows of a batch that are searched together
_SHARED = 32  # of those, rows that read the same groups
_FEW_SCORES = 2**18  # that are sooner computed all
_FEW_LOGITS = 2**14  # that are sooner looked at one by one than in groups
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
    """So many items tie for the last place that those of several rows cannot be kept together."""


def search(table: SearchTable, hidden: Tensor, limits: Limits) -> Found:
    """The k best items of each row.

    The items do not depend on the batch, on pieces or on an index, and neither do the scores of a
    flat softmax. A tree's scores may, in the last digit: normalisers are sums in the model's
    precision, and in float64 only for rows whose order could depend on them.

    Args:
        table: the weights.
        hidden: hidden states, `[B, d]`.
        limits: how many items, and which.

    Raises:
        CompressionError: hidden states that are not finite numbers, or scores that overflow.
    """
    n_rows, size = len(hidden), max(1, min(_BATCH, 2**18 // limits.k))
    if not n_rows:
        scores = hidden.new_empty(0, limits.k, dtype=table.dtype)
        return Found(TopK(scores.long(), scores), 0.0)
    if n_rows <= size:
        parts = [_Part(table, hidden.double(), limits)]
    else:
        pieces = torch.arange(n_rows, device=hidden.device).split(size)
        parts = [_Part(table, hidden[rows].double(), limits.of_rows(rows)) for rows in pieces]
    topk = _joined([part.topk() for part in parts])
    return Found(topk, sum(part.tail_rows for part in parts) / max(1, n_rows * table.n_tail))


class _Part:
    """Some rows of a batch that are searched together.

    Arrays of logits have the batch last. In a block, score = logit + offset. A flat softmax has no
    offsets; a tree's are minus the head's normaliser, and a cluster's log-probability minus its
    block's normaliser.

    Attributes:
        slack: scores that are closer than this may be in either order, `[B]`.
        offsets: of each block, `[n_blocks, B]`, float64; zeros without a tree.
        tail_rows: products of a row of the tail and a row of the batch.
    """

    def __init__(self, table: SearchTable, hidden: Tensor, limits: Limits) -> None:
        self.table, self.hidden, self.limits, self.k = table, hidden, limits, limits.k
        self.is_tree = table.clusters is not None
        lengths = torch.linalg.vector_norm(hidden, dim=1)
        slack = lengths * table.rounding
        if table.clusters is not None:
            self.branches = (hidden.unsqueeze(1) * table.clusters).sum(2)  # logits of clusters
            self.offsets = hidden.new_zeros(len(table.blocks), len(hidden))
            # normalisers are off by as much as logits, and by what rounding does to their sums
            scale = lengths * table.longest + math.log(table.partition.n_items)
            slack = 2 * slack + 16 * torch.finfo(table.dtype).eps * scale
        self.slack = slack.to(table.dtype)
        self.everyone = torch.arange(len(hidden), device=hidden.device)
        self.tail_rows = 0

    def topk(self) -> TopK:
        """The result."""
        if self.table.vectors is None:
            n_scores = len(self.hidden) * self.table.partition.n_items
            if n_scores > _FEW_SCORES or self.limits.allowed is not None:
                return self._search()
        return self._sort_all()

    def _sort_all(self) -> TopK:
        """Sort all scores, in as few steps as it takes; search where two places are too close."""
        table, k, allowed = self.table, self.k, self.limits.allowed
        queries = (self.hidden @ table.basis).to(table.dtype).split_with_sizes(table.ranks, 1)
        logits = [torch.mm(query, columns) for query, columns in zip(queries, table.columns())]
        if self.is_tree:
            for j, part in enumerate(logits):
                self.offsets[j] = self._offset(j, slice(None), part.logsumexp(1))
                part += self.offsets[j].to(part.dtype).unsqueeze(1)
        scores = torch.cat(logits, 1)
        if len(self.limits.excluded):
            rows, positions = self.limits.pairs()
            scores[rows, positions - 1] = -torch.inf
        if allowed is not None:
            scores = scores[:, allowed - 1]
        best, at = scores.topk(min(k + 1, scores.shape[1]), dim=1)
        gap = best[:, :-1] - best[:, 1:]
        sure = (gap > self.slack.unsqueeze(1)) & (gap < torch.inf)
        at = at[:, :k] if allowed is None else allowed[at[:, :k]] - 1
        if table.vectors is not None:
            exact = (table.vectors[at] * self.hidden.unsqueeze(1)).sum(2)
        else:
            columns = self.everyone.repeat_interleave(k)
            exact = self._exact_logits(columns, at.flatten() + 1).view_as(at)
        exact = self._with_offsets(exact, self.everyone.unsqueeze(1), at + 1)
        topk = TopK(table.items[at].long(), exact.to(table.dtype))
        self.tail_rows = len(self.hidden) * self.table.n_tail
        if sure.all() and sure.shape[1]:
            return topk
        close = (~sure).any(1).nonzero().squeeze(1) if sure.shape[1] else self.everyone
        rest = _Part(table, self.hidden[close], self.limits.of_rows(close))._search()
        topk.items[close], topk.scores[close] = rest
        return topk

    def _search(self) -> TopK:
        """Read what may hold one of the best, and sort the candidates."""
        if not self.hidden.isfinite().all():
            raise CompressionError(
                "Expected `hidden` to hold finite numbers, but found NaN or infinity; the model "
                "diverged in training, or its input is damaged."
            )
        allowed = self.limits.allowed
        self.queries = [block.query(self.hidden) for block in self.table.blocks]  # [B, r], float64
        self.best = self.slack.new_full((self.k, len(self.hidden)), -torch.inf)  # of other items
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []  # columns, positions, scores
        try:
            for j, block in enumerate(self.table.indexed):
                if allowed is not None:
                    self._read(j, self.table.blocks[j].pick(allowed), self.everyone)
                elif block.bounds is not None:
                    self._read_groups(j, block, *block.bounds)
                else:
                    self._read(j, block, self.everyone)
            return self._sort_candidates()
        except TooManyCandidates:
            halves = [
                _Part(self.table, self.hidden[rows], self.limits.of_rows(rows))
                for rows in self.everyone.chunk(2)
            ]
            topk = _joined([half._search() for half in halves])
            self.tail_rows = sum(half.tail_rows for half in halves)
            return topk

    # -- the first pass ----------------------------------------------------------------------------

    def _read(self, j: int, block: Rows, columns: Tensor) -> None:
        """Read all of a block for some rows of the batch."""
        whole = self.table.blocks[j]
        query = self.queries[j][columns].to(self.table.dtype).T.contiguous()
        n_rows, rank = block.values.shape
        size = 1
        if n_rows * len(columns) > _FEW_LOGITS:
            # larger groups mean fewer maxima to sort, and more rows to read again for each
            size = min(round((2 * n_rows / (self.k * rank)) ** 0.5), n_rows // (8 * self.k))
        maxima, log_sum = self._maxima(j, block, query, columns, max(1, size), self.is_tree)
        if self.is_tree:
            if block is not whole:
                log_sum = group_maxima(whole.values, query, 64, with_sums=True)[1]
            self.offsets[j, columns] = self._offset(j, columns, log_sum)
            maxima = maxima + self.offsets[j, columns].to(maxima.dtype)
        self._raise_floor(columns, maxima)
        self._keep(j, block, columns, query, maxima, max(1, size))

    def _read_groups(self, j: int, block: Rows, groups: Bounds, branches: Bounds) -> None:
        """Read those groups of a block that may hold one of the best.

        In a tree scores have the block's normaliser, and that takes all of the block: it is read
        for those rows where, for all that bounds say of the normaliser, an item may do.
        """
        query = (self.hidden @ block.basis).to(self.table.dtype).T.contiguous()
        floor = self._floor(self.everyone) - self._offset_above(j, self.everyone, branches, query)
        upper = branches.above(query)
        columns = (upper.amax(0) >= floor).nonzero().squeeze(1)
        # rows that look for near items beside each other, to read the same groups
        columns = columns[upper[:, columns].argmax(0).argsort()]
        parts = columns.split(_SHARED) if len(columns) else ()
        opened = [self._read_near(j, block, groups, some, query[:, some]) for some in parts]
        columns = torch.cat([columns[:0], *opened])
        if len(columns):
            self._read(j, self.table.blocks[j], columns)

    def _read_near(
        self, j: int, block: Rows, groups: Bounds, columns: Tensor, query: Tensor
    ) -> Tensor:
        """Read the groups that any of some rows needs; returns those for which all of a tree's
        block has to be read."""
        upper = groups.above(query)
        floor = self._floor(columns) - self._offset_above(j, columns, groups, query)
        if self.is_tree:
            chosen = _reaching(upper, floor)
            maxima, _ = self._maxima(j, block, query, columns, groups.size, False, chosen)
            return columns[(maxima >= floor).any(0)]
        lowest = torch.where(floor == -torch.inf, upper.amin(0), floor)
        read = []
        # the most promising first, to raise the floor
        for least in ((3 * upper.amax(0) + lowest) / 4, None):
            floor = self._floor(columns)
            chosen = _reaching(upper, floor if least is None else torch.maximum(floor, least))
            maxima, _ = self._maxima(j, block, query, columns, groups.size, False, chosen)
            self._raise_floor(columns, maxima)
            upper[chosen] = torch.nan  # which reaches nothing: no group is read twice
            read.append((maxima, chosen))
        for maxima, chosen in read:
            self._keep(j, block, columns, query, maxima, groups.size, chosen)
        return columns[:0]

    def _maxima(
        self,
        j: int,
        block: Rows,
        query: Tensor,
        columns: Tensor,
        size: int,
        with_sums: bool,
        groups: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See group_maxima; without what is excluded, and counted."""
        n_rows = len(block.values) if groups is None else len(groups) * size
        self.tail_rows += n_rows * len(columns) if j else 0
        excluded = None
        if len(self.limits.excluded):
            numbers, positions = self.limits.of_rows(columns).pairs()
            rows = block.find(positions)
            numbers, rows = numbers[rows >= 0], rows[rows >= 0]
            rows, order = rows.sort()
            excluded = rows, numbers[order]
        return group_maxima(block.values, query, size, groups, excluded, with_sums=with_sums)

    def _floor(self, columns: Tensor) -> Tensor:
        """What an item must reach to be among the k best, but for rounding, `[B]`."""
        return self.best[-1, columns] - self.slack[columns]

    def _raise_floor(self, columns: Tensor, scores: Tensor) -> None:
        """Scores of items that none of the best so far stands for, `[m, B]`."""
        best = torch.cat([self.best[:, columns], scores])
        self.best[:, columns] = best.topk(self.k, dim=0).values

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
        """Collect the items of groups that may be among the best.

        Raises:
            TooManyCandidates: more than can be kept, of more than one row.
        """
        floor = self._floor(columns)
        group, number = (maxima >= floor).nonzero().unbind(1)
        group = group if groups is None else groups[group]
        slots = torch.arange(size, device=group.device)
        n_pairs = max(1, _NUMBERS // (size * len(query)))
        for some, here in zip(group.split(n_pairs), number.split(n_pairs)):
            rows = some.unsqueeze(1) * size + slots  # [P, s]
            codes = block.values[rows.clamp(max=block.n_items - 1)]
            scores = torch.bmm(codes, query.T[here].unsqueeze(2)).squeeze(2)
            if self.is_tree:
                scores += self.offsets[j, columns[here]].to(scores.dtype).unsqueeze(1)
            reaches = (scores >= floor[here].unsqueeze(1)) & (rows < block.n_items)
            pair, slot = reaches.nonzero().unbind(1)
            positions = block.positions(rows[pair, slot])
            self.found.append((columns[here[pair]], positions, scores[pair, slot]))
            if len(self.hidden) > 1 and sum(len(part[0]) for part in self.found) > _MOST:
                raise TooManyCandidates

    # -- offsets of a tree -------------------------------------------------------------------------

    def _offset(self, j: int, columns: Tensor, log_sum: Tensor) -> Tensor:
        """A block's offset for some rows, given the log of its summed exponentials, `[B]`."""
        log_sum = log_sum.double()
        if j == 0:
            return -torch.cat([log_sum.unsqueeze(1), self.branches[columns]], 1).logsumexp(1)
        return self.branches[columns, j - 1] + self.offsets[0, columns] - log_sum

    def _offset_above(self, j: int, columns: Tensor, bounds: Bounds, query: Tensor) -> Tensor:
        """A number that the offset does not exceed; zeros without a tree."""
        if not self.is_tree:
            return torch.zeros_like(query[0])
        return self._offset(j, columns, bounds.log_sum_below(query)).to(query.dtype)

    def _refine_offsets(self, columns: Tensor) -> None:
        """Compute the offsets of some rows in float64, each row on its own."""
        for j, block in enumerate(self.table.blocks):
            queries = self.queries[j][columns]
            parts = block.values.split(max(1, _NUMBERS // block.values.shape[1]))
            sums = [
                torch.stack([(codes @ query).logsumexp(0) for query in queries])
                for codes in (part.double() for part in parts)
            ]
            self.offsets[j, columns] = self._offset(j, columns, torch.stack(sums).logsumexp(0))

    # -- into order --------------------------------------------------------------------------------

    def _sort_candidates(self) -> TopK:
        """The k best of the items that were kept."""
        columns, positions, scores = (torch.cat(part) for part in zip(*self.found))
        real = scores >= self._floor(self.everyone)[columns]
        real &= ~self.limits.excludes(columns, positions)
        columns, positions = columns[real], positions[real]
        items = self.table.items[positions - 1].long()
        by_id = items.argsort()
        columns, positions, items = columns[by_id], positions[by_id], items[by_id]
        logits = self._exact_logits(columns, positions)
        scores = self._with_offsets(logits, columns, positions)
        order = _in_order(columns, scores.to(self.table.dtype))
        if self.is_tree:
            unsure = self._unsure(columns[order], positions[order], scores[order])
            if len(unsure):
                self._refine_offsets(unsure)
                scores = self._with_offsets(logits, columns, positions)
                order = _in_order(columns, scores.to(self.table.dtype))
        counts = torch.bincount(columns, minlength=len(self.hidden))
        scores = scores.to(self.table.dtype)
        if int(counts.min()) < self.k or not scores.isfinite().all():
            raise CompressionError(
                "Expected scores to be finite numbers, but they overflow; the hidden states or the "
                "weights of the item table are far too large."
            )
        first = (counts.cumsum(0) - counts).unsqueeze(1)
        best = order[first + torch.arange(self.k, device=order.device)]
        return TopK(items[best], scores[best])

    def _exact_logits(self, columns: Tensor, positions: Tensor) -> Tensor:
        """Logits in float64, `[C], [C] -> [C]`: sums of products, not products of matrices, in
        which a result's last digit depends on how many there are."""
        if self.table.vectors is not None:
            return (self.table.vectors[positions - 1] * self.hidden[columns]).sum(1)
        logits = self.hidden.new_empty(len(positions))
        for block in self.table.blocks:
            query, rows = block.query(self.hidden), block.find(positions)
            for here in (rows >= 0).nonzero().squeeze(1).split(_NUMBERS // query.shape[1]):
                codes = block.values[rows[here]].double()
                logits[here] = (codes * query[columns[here]]).sum(1)
        return logits

    def _with_offsets(self, logits: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
        """Scores, given logits."""
        if not self.is_tree:
            return logits
        return logits + self.offsets[self.table.partition.blocks(positions), columns]

    def _unsure(self, columns: Tensor, positions: Tensor, scores: Tensor) -> Tensor:
        """Rows whose order errors of the offsets could change, given sorted candidates: that of two
        blocks, or in one where it decides to which numbers scores are rounded."""
        blocks = self.table.partition.blocks(positions)
        gap = (scores[:-1] - scores[1:]).abs()
        digits = 4 * torch.finfo(self.table.dtype).eps * scores[1:].abs()
        across = (blocks[:-1] != blocks[1:]) & (gap <= self.slack[columns[1:]])
        unsure = across | (gap > 0) & (gap <= digits)
        return columns[1:][unsure & (columns[:-1] == columns[1:])].unique()


def _in_order(columns: Tensor, scores: Tensor) -> Tensor:
    """How to sort candidates by row of the batch, then by falling score, `[C]`."""
    order = scores.argsort(descending=True, stable=True)
    return order[columns[order].argsort(stable=True)]


def _reaching(upper: Tensor, floor: Tensor) -> Tensor:
    """Groups with a bound that reaches the floor of some row, `[G, B], [B] -> [G']`."""
    return (upper >= floor).any(1).nonzero().squeeze(1)


def _joined(parts: list[TopK]) -> TopK:
    return parts[0] if len(parts) == 1 else TopK(*(torch.cat(part) for part in zip(*parts)))
