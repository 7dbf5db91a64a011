"""Exact top-k over a factorised catalogue (CpRec, section 3.2), in operations of torch.

A first pass in the model's precision finds every item that rounding could let into the result.
Scores of these candidates are computed in float64, each from its own products alone, rounded to the
model's precision and sorted, equal ones by lower item id.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from cprec_recbole.search.compiled import compiled_search
from cprec_recbole.search.maxima import group_maxima
from cprec_recbole.search.table import Rows, SearchTable
from cprec_recbole.search.topk import Found, Limits, TopK, not_finite

_BATCH = 256  # rows of a batch that are searched together
_FEW_SCORES = 2**18  # that are sooner computed all
_FEW_LOGITS = 2**15  # that are sooner looked at one by one than in groups
_NUMBERS = 2**20  # to work on at a time
_MOST = 2**21  # candidates of several rows that are kept together


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
    compiled = compiled_search(table)
    if compiled is not None:
        return compiled.search(hidden, limits)
    parts = [whole := _Part(table, hidden.double(), limits)]
    if n_rows > size:
        rows = torch.arange(n_rows, device=hidden.device).split(size)
        parts = [whole.take(some) for some in rows]
    topk = _joined([part.topk() for part in parts])
    return Found(topk, sum(part.tail_rows for part in parts) / max(1, n_rows * table.n_tail))


class _Part:
    """Some rows of a batch that are searched together.

    In a block, score = logit + offset. A flat softmax has no offsets; a tree's are minus the head's
    normaliser, and a cluster's log-probability minus its block's normaliser.

    Attributes:
        slack: scores that are closer than this may be in either order, `[B]`.
        best: while blocks are read, the k best scores of different items so far, `[k, B]`.
        offsets: of each block, `[B, n_blocks]`, float64.
        found: rows, positions and scores of candidates.
        tail_rows: products of a row of the tail and a row of the batch.
    """

    def __init__(self, table: SearchTable, hidden: Tensor, limits: Limits) -> None:
        self.table, self.hidden, self.limits, self.k = table, hidden, limits, limits.k
        self.is_tree = table.clusters is not None
        lengths = torch.linalg.vector_norm(hidden, dim=1)
        slack = lengths * table.rounding
        self.offsets = hidden.new_zeros(len(hidden), len(table.blocks))
        if table.clusters is not None:
            self.clusters = (hidden.unsqueeze(1) * table.clusters).sum(2)
            # normalisers are off by as much as logits, and by what rounding does to their sums
            scale = lengths * table.longest + math.log(table.partition.n_items)
            slack = 2 * slack + 16 * torch.finfo(table.dtype).eps * scale
        self.slack = slack.to(table.dtype)
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tail_rows = 0

    def take(self, rows: Tensor) -> _Part:
        """Some of the rows as a part of their own, with nothing found."""
        part = copy.copy(self)
        part.hidden, part.limits = self.hidden[rows], self.limits.of_rows(rows)
        part.slack, part.offsets = self.slack[rows], self.offsets[rows]
        if self.is_tree:
            part.clusters = self.clusters[rows]
        part.found, part.tail_rows = [], 0
        return part

    def topk(self) -> TopK:
        """The result."""
        n_scores = len(self.hidden) * self.table.partition.n_items
        try:
            if n_scores <= _FEW_SCORES or self.table.is_small:
                return self.sort_all()
            return self.search()
        except TooManyCandidates:
            rows = torch.arange(len(self.hidden), device=self.hidden.device)
            fresh = _Part(self.table, self.hidden, self.limits)
            parts = [fresh.take(half) for half in rows.chunk(2)]
            topk = _joined([part.topk() for part in parts])
            self.tail_rows = sum(part.tail_rows for part in parts)
            return topk

    def sort_all(self) -> TopK:
        """Sort the scores of all items."""
        table, allowed = self.table, self.limits.allowed
        queries = (self.hidden @ table.joint_basis).to(table.dtype).split_with_sizes(table.ranks, 1)
        scores = queries[0].new_empty(len(self.hidden), table.partition.n_items - 1)
        logits = scores.split_with_sizes([len(block.values) for block in table.blocks], 1)
        for j, (query, columns, part) in enumerate(zip(queries, table.columns, logits)):
            torch.mm(query, columns, out=part)
            if self.is_tree:
                self.offsets[:, j] = self.offset(j, part.logsumexp(1))
                part += self.offsets[:, j, None].to(part.dtype)
        self.tail_rows = len(self.hidden) * table.n_tail
        if len(self.limits.excluded):
            rows, positions = self.limits.pairs()
            scores[rows, positions - 1] = -torch.inf
        if allowed is not None:
            return self.sort_near(scores[:, allowed - 1], allowed.expand(len(scores), -1))
        return self.sort_near(scores)

    def search(self) -> TopK:
        """Read what may hold one of the best, and sort it."""
        self.best = self.slack.new_full((self.k, len(self.hidden)), -torch.inf)
        for j, block in enumerate(self.table.blocks):
            allowed = self.limits.allowed
            self.read(j, block if allowed is None else block.pick(allowed))
        numbers, positions, scores = (torch.cat(part) for part in zip(*self.found))
        real = scores >= self.floor()[numbers]
        if len(self.limits.excluded):
            real &= ~self.limits.excludes(numbers, positions)
        numbers, positions, scores = numbers[real], positions[real], scores[real]
        if len(self.hidden) == 1 and len(scores) >= self.k:
            return self.sort_near(scores.unsqueeze(0), positions.unsqueeze(0))
        counts = torch.bincount(numbers, minlength=len(self.hidden))
        width = max(self.k, int(counts.max()))
        self.check_number(width * len(counts))
        numbers, order = numbers.sort()
        column = (
            torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[numbers]
        )
        near = scores.new_full((len(counts), width), -torch.inf)
        places = positions.new_zeros(len(counts), width)
        near[numbers, column], places[numbers, column] = scores[order], positions[order]
        return self.sort_near(near, places)

    # -- the first pass ----------------------------------------------------------------------------

    def read(self, j: int, block: Rows) -> None:
        """Read all rows of a block, or those that are allowed."""
        (n_rows, rank), query, size = block.values.shape, block.query(self.hidden), 1
        if n_rows * len(self.hidden) > _FEW_LOGITS:
            # larger groups mean fewer maxima to sort, and more rows to read again for each
            size = min(round((2 * n_rows / (self.k * rank)) ** 0.5), n_rows // (8 * self.k))
        size = max(1, size)
        maxima, log_sum = self.maxima(j, block, query, size)
        if self.is_tree:
            whole = self.table.blocks[j]
            if block is not whole:
                log_sum = group_maxima(whole.values, query, 64, with_sums=True)[1]
            self.offsets[:, j] = self.offset(j, log_sum)
            maxima = maxima + self.offsets[:, j].to(maxima.dtype)
        self.best = torch.cat([self.best, maxima]).topk(self.k, dim=0).values
        self.keep(j, block, query, maxima, size)

    def maxima(self, j: int, block: Rows, query: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """See group_maxima; without what is excluded."""
        self.tail_rows += len(block.values) * len(self.hidden) if j else 0
        excluded = None
        if len(self.limits.excluded):
            numbers, positions = self.limits.pairs()
            rows, order = block.find(positions).sort()
            here = rows >= 0
            excluded = rows[here], numbers[order][here]
        return group_maxima(block.values, query, size, excluded, with_sums=self.is_tree)

    def keep(self, j: int, block: Rows, query: Tensor, maxima: Tensor, size: int) -> None:
        """Take the items of groups that may be among the best."""
        floor = self.floor()
        group, number = (maxima >= floor).nonzero().unbind(1)
        if size == 1:
            self.check_number(len(number))
            self.found.append((number, block.positions(group), maxima[group, number]))
            return
        slots = torch.arange(size, device=group.device)
        offsets, n_rows = self.offsets[:, j].to(floor.dtype), len(block.values)
        n_pairs = max(1, _NUMBERS // (size * len(query)))
        for some, here in zip(group.split(n_pairs), number.split(n_pairs)):
            rows = some.unsqueeze(1) * size + slots  # [P, s]
            codes = block.values[rows.clamp(max=n_rows - 1)]
            scores = torch.bmm(codes, query.T[here].unsqueeze(2)).squeeze(2)
            scores += offsets[here].unsqueeze(1)
            reaches = (scores >= floor[here].unsqueeze(1)) & (rows < n_rows)
            pair, slot = reaches.nonzero().unbind(1)
            positions = block.positions(rows[pair, slot])
            self.found.append((here[pair], positions, scores[pair, slot]))
            self.check_number(sum(len(part[0]) for part in self.found))

    def check_number(self, n_candidates: int) -> None:
        """Raise TooManyCandidates where several rows have too many."""
        if len(self.hidden) > 1 and n_candidates > _MOST:
            raise TooManyCandidates

    def floor(self) -> Tensor:
        """What an item must reach to be among the k best, but for rounding, `[B]`."""
        return self.best[-1] - self.slack

    # -- offsets of a tree -------------------------------------------------------------------------

    def offset(self, j: int, log_sum: Tensor) -> Tensor:
        """A block's offset, given the log of its summed exponentials, `[B]`."""
        log_sum = log_sum.double()
        if j == 0:
            return -torch.cat([log_sum.unsqueeze(1), self.clusters], 1).logsumexp(1)
        return self.clusters[:, j - 1] + self.offsets[:, 0] - log_sum

    def exact_offsets(self) -> Tensor:
        """All offsets in float64, each row's on its own, `[B, n_blocks]`."""
        for j, block in enumerate(self.table.blocks):
            queries = block.exact_query(self.hidden)
            sums = [
                torch.stack([(codes.double() @ query).logsumexp(0) for query in queries])
                for codes in block.values.split(max(1, _NUMBERS // block.values.shape[1]))
            ]
            self.offsets[:, j] = self.offset(j, torch.stack(sums).logsumexp(0))
        return self.offsets

    # -- into order --------------------------------------------------------------------------------

    def sort_near(self, scores: Tensor, positions: Tensor | None = None) -> TopK:
        """The k best of items with scores of the first pass, `[B, m], [B, m]`; of all items where
        no positions are given."""
        k = self.k
        best, at = scores.topk(min(k + 1, scores.shape[1]), dim=1)
        if best.shape[1] == 1:
            return self.sort_close(scores, positions, best)
        places = at[:, :k] + 1 if positions is None else positions.gather(1, at[:, :k])
        topk = TopK(self.table.item_at[places].long(), self.exact(places).to(self.table.dtype))
        apart = best[:, :-1] - best[:, 1:] - self.slack.unsqueeze(1)
        low, high = apart.aminmax()
        if float(low) > 0 and float(high) < math.inf:
            return topk  # no two are close, and all are numbers
        close = (~((apart > 0) & (apart < math.inf)).all(1)).nonzero().squeeze(1)
        if len(close) == len(scores):
            return self.sort_close(scores, positions, best)
        near = None if positions is None else positions[close]
        found = self.take(close).sort_close(scores[close], near, best[close])
        topk.items[close], topk.scores[close] = found
        return topk

    def sort_close(self, scores: Tensor, positions: Tensor | None, best: Tensor) -> TopK:
        """The same where rounding could have changed the order, given the best scores, sorted."""
        floor = best[:, self.k - 1 : self.k] - self.slack.unsqueeze(1)
        n_near = max(self.k, int((scores >= floor).sum(1).max()))
        self.check_number(n_near * len(scores))
        best, at = scores.topk(n_near, dim=1)
        positions = at + 1 if positions is None else positions.gather(1, at)
        return self.sort(positions, (best >= floor) & (best > -torch.inf))

    def sort(self, positions: Tensor, real: Tensor) -> TopK:
        """The k best of candidates: positions, and which of them count, `[B, m], [B, m]`."""
        items = self.table.item_at[positions].long()
        by_id = items.argsort(dim=1)
        items, positions, real = (part.gather(1, by_id) for part in (items, positions, real))
        exact, order = self.in_order(positions, real)
        if self.is_tree:
            unsure = self.unsure(positions.gather(1, order), exact.gather(1, order))
            if len(unsure):
                self.offsets[unsure] = self.take(unsure).exact_offsets()
                exact, order = self.in_order(positions, real)
        order = order[:, : self.k]
        scores = exact.gather(1, order).to(self.table.dtype)
        if not scores.isfinite().all():
            raise not_finite(self.hidden)
        return TopK(items.gather(1, order), scores)

    def exact(self, positions: Tensor) -> Tensor:
        """Scores in float64, `[B, m] -> [B, m]`."""
        scores = self.table.exact_logits(self.hidden, positions)
        if self.is_tree:
            scores += self.offsets.gather(1, self.table.partition.blocks(positions))
        return scores

    def in_order(self, positions: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Scores in float64, `[B, m]`, and how to sort them by what they are when rounded."""
        scores = torch.where(real, self.exact(positions), -torch.inf)
        order = scores.to(self.table.dtype).argsort(dim=1, descending=True, stable=True)
        return scores, order

    def unsure(self, positions: Tensor, scores: Tensor) -> Tensor:
        """Rows whose order errors of the offsets could change, given sorted candidates: that of two
        blocks, or in one where it decides to which numbers scores are rounded."""
        gap = scores.diff(dim=1).abs()
        digits = 4 * torch.finfo(self.table.dtype).eps * scores[:, :-1].abs()
        across = self.table.partition.blocks(positions).diff(dim=1) != 0
        unsure = (gap > 0) & (gap <= digits) | across & (gap <= self.slack.unsqueeze(1))
        return unsure.any(1).nonzero().squeeze(1)


def _joined(parts: list[TopK]) -> TopK:
    return parts[0] if len(parts) == 1 else TopK(*(torch.cat(part) for part in zip(*parts)))
