"""Exact top-k over a factorised catalogue, most of which is not read (CpRec, section 3.2).

A first pass in the model's precision finds every item that rounding could let into the result;
where two places are closer than rounding errors, `settle` decides. So the result is that of a dense
sort, equal scores by lower item id, whatever the batch, the pieces or the index.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.reading import Reader, TooManyCandidates
from cprec_recbole.settle import PIECE, Rows, Weights, sort_topk
from cprec_recbole.strips import GroupedStrip, PickedStrip, Strip
from cprec_recbole.topk import Barred, TopK

_SORTED = 2**15, 2**18  # items, or scores, that are sooner sorted than searched
_SPARE = 8  # items beyond the k-th that are looked at when all scores are sorted
_ROWS = 256  # rows of a batch that are searched together
_LANES = 32  # rows of a batch that read the same groups; fewer leave vector units idle
_GROUP = 64  # rows of a plain strip of which only the sum is kept


class Found(NamedTuple):
    """A search's result, and what it took.

    Attributes:
        topk: the result.
        tail_share: share of the tail's rows that were read for a row of the batch, on average.
    """

    topk: TopK
    tail_share: float


def search(
    weights: Weights, hidden: Tensor, k: int, barred: Barred, allowed: Tensor | None = None
) -> Found:
    """The k best items of each row, among those that are not barred.

    Args:
        weights: the head's.
        hidden: hidden states, `[B, d]`.
        k: at most as many as each row has items left.
        barred: what each row must not get.
        allowed: positions of the only items that rows may get, sorted; None for all.

    Raises:
        CompressionError: hidden states that are not finite numbers.
    """
    hidden = hidden.double()
    longest = float(torch.linalg.vector_norm(hidden))
    if not math.isfinite(longest):
        raise CompressionError(
            "Expected `hidden` to hold finite numbers, but found NaN or infinity; the model "
            "diverged in training, or its input is damaged."
        )
    n_rows = len(hidden)
    n_items = weights.n_items - 1 if allowed is None else len(allowed)
    is_sorted = n_items <= _SORTED[0] or n_items * n_rows <= _SORTED[1] or 16 * k > n_items
    most = max(1, 2 * PIECE // n_items) if is_sorted else max(1, min(_ROWS, 2**18 // k))
    strips: Sequence[Strip] = weights.whole if is_sorted else weights.indexed
    if allowed is not None:
        strips = [PickedStrip(strip, allowed) for strip in weights.whole]
    way = _Sorted if is_sorted else _Searched
    size = -(-n_rows // max(1, -(-n_rows // most)))  # parts of equal size
    parts, tail_rows = [], 0
    for start in range(0, n_rows, max(1, size)):
        part = hidden[start : start + size] if size < n_rows else hidden
        some = barred.of_rows(start, start + size) if size < n_rows else barred
        rows = way(weights, strips, part, longest, k, some, allowed)
        parts.append(rows.topk())
        tail_rows += rows.tail_rows
    if not parts:
        parts = [TopK(hidden.new_empty(0, k).long(), hidden.new_empty(0, k).to(weights.dtype))]
    topk = parts[0] if len(parts) == 1 else TopK(*(torch.cat(part) for part in zip(*parts)))
    return Found(topk, tail_rows / max(1, n_rows * weights.n_tail))


def search_one(weights: Weights, hidden: Tensor, k: int) -> TopK | None:
    """One row in a small catalogue under a flat softmax, where a step costs as much as all of the
    arithmetic: in as few steps as it takes.

    None where that is not the case, or two places are too close to be sure.
    """
    if weights.clusters is not None or weights.n_items > _SORTED[0] or len(hidden) != 1:
        return None
    basis, ranks, rounding = weights.joint_basis
    queries = torch.mm(hidden.to(basis.dtype), basis).split_with_sizes(ranks, 1)
    blocks = [torch.mm(query, strip.columns) for query, strip in zip(queries, weights.whole)]
    best, columns = torch.cat(blocks, dim=1).topk(min(k + 1, weights.n_items - 1))
    values = best[0].tolist()
    gap = min(map(operator.sub, values, values[1:]), default=math.inf)
    if not gap > rounding * float(torch.linalg.vector_norm(hidden)):  # nor if it is not a number
        return None
    return TopK(weights.real_items.take(columns[:, :k]), best[:, :k])


class _Sorted(Rows):
    """All items are scored and sorted: for small catalogues, and where much of one is wanted."""

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
        if not gaps.numel() or float(gaps.amin()) > self.rounding * self.longest + self.most_blur():
            return result
        doubt = self.doubt().unsqueeze(1)
        close = (gaps <= doubt).any(1)
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
                log_sum = _log_sum(self.weights.whole[j], self.hidden)
            block += self.offset(j, everyone, log_sum).unsqueeze(1)


class _Searched(Rows):
    """The head is read, then what of the other blocks may hold one of the best."""

    def topk(self) -> TopK:
        """The result."""
        if self.n_rows > 1:  # fill the lanes; what the last row gets more than once is dropped
            self.widen(-self.n_rows % _LANES)
        self.columns = [query.T.contiguous() for query in self.queries()]  # [r, B]
        self.best = self.slack.new_full((self.k, len(self.hidden)), -torch.inf)
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, positions, scores
        everyone = torch.arange(len(self.hidden), device=self.hidden.device)
        try:
            for j, strip in enumerate(self.strips):
                if isinstance(strip, GroupedStrip):
                    self._read_grouped(j, strip)
                else:
                    self._read_whole(j, everyone, self.n_rows)
        except TooManyCandidates:
            rows = self.hidden[: self.n_rows]
            return sort_topk(self.weights, rows, self.k, self.barred, self.allowed)
        return self._rank(*(torch.cat(part) for part in zip(*self.found)))

    # -- reading -----------------------------------------------------------------------------------

    def _read_whole(self, j: int, rows: Tensor, n_real: int) -> None:
        """Read all of a block for some rows of the batch; those after `n_real` only fill lanes."""
        reader = self._reader(j, rows)
        offset = self.slack.new_zeros(len(rows))
        if not self.is_tree:
            maxima = reader.maxima()
        elif self.allowed is None:
            maxima, log_sum = reader.maxima_and_log_sum()
            offset = self.offset(j, rows, log_sum)
        else:
            maxima = reader.maxima()
            offset = self.offset(j, rows, _log_sum(self.weights.whole[j], self.hidden[rows]))
        rows, maxima, offset = rows[:n_real], maxima[:, :n_real], offset[:n_real]
        self._raise_floor(rows, maxima + offset)
        self._keep(j, reader, rows, maxima, offset)

    def _read_grouped(self, j: int, strip: GroupedStrip) -> None:
        """Read those groups of a block that may hold one of the best."""
        lanes = strip.by_likeness(self.columns[j]).split(_LANES)
        if not self.is_tree:
            for rows in lanes:
                self._read_near(j, strip, rows)
            return
        rows = torch.cat([self._worth_opening(j, strip, rows) for rows in lanes])
        if len(rows):
            fill = -len(rows) % _LANES if self.n_rows > 1 else 0
            self._read_whole(j, torch.cat([rows, rows[-1:].expand(fill)]), len(rows))

    def _read_near(self, j: int, strip: GroupedStrip, rows: Tensor) -> None:
        """Read the groups of a block that may hold one of the best of any of these rows."""
        reader, floor = self._reader(j, rows), self._floor(rows)
        branches = _reaching(strip.branch_bounds.above(reader.query), floor)
        if not len(branches):
            return
        groups = strip.groups_of(branches)
        upper = strip.bounds_of(groups).above(reader.query)
        # the most promising groups first, to raise the floor for the others
        lowest = torch.where(floor == -torch.inf, upper.amin(0), floor)
        first = _reaching(upper, torch.maximum(floor, (3 * upper.amax(0) + lowest) / 4))
        if not len(first):
            return
        self._raise_floor(rows, reader.logits_or_maxima(groups[first]))
        groups = groups[_reaching(upper, self._floor(rows))]
        self._keep(j, reader, rows, reader.maxima(groups), floor.new_zeros(len(rows)), groups)

    def _worth_opening(self, j: int, strip: GroupedStrip, rows: Tensor) -> Tensor:
        """Those rows for which a block of a tree may hold one of the best.

        Scores need the block's normaliser, and that all of the block. It is at least what the
        bounds say, which is enough to see that an item will not do.
        """
        reader, floor = self._reader(j, rows), self._floor(rows)
        offset = self.offset(j, rows, strip.branch_bounds.log_sum_below(reader.query))
        branches = _reaching(strip.branch_bounds.above(reader.query), floor - offset)
        if not len(branches):
            return rows[:0]
        floor = floor - self.offset(j, rows, strip.bounds.log_sum_below(reader.query))
        groups = strip.groups_of(branches)
        groups = groups[_reaching(strip.bounds_of(groups).above(reader.query), floor)]
        best = reader.maxima(groups)
        self._count(j, reader, len(rows))
        return rows[(best >= floor).any(0)]

    def _reader(self, j: int, rows: Tensor) -> Reader:
        # larger groups mean fewer maxima to sort, and more rows to read again for each of the best
        n_rows, rank = self.strips[j].codes.shape
        group = max(1, min(round((2 * n_rows / (self.k * rank)) ** 0.5), n_rows // (8 * self.k)))
        barred = self.barred.pick(rows, len(self.hidden))
        return Reader(self.strips[j], self.columns[j][:, rows], barred, group)

    def _floor(self, rows: Tensor) -> Tensor:
        """What an item must reach to be among the k best, but for rounding, `[B]`."""
        return self.best[-1, rows] - self.doubt(rows)

    def _raise_floor(self, rows: Tensor, scores: Tensor) -> None:
        """Scores of items that none of the best so far stands for, `[m, B]`."""
        best = torch.cat([self.best[:, rows], scores])
        self.best[:, rows] = best.topk(self.k, dim=0).values

    def _keep(
        self,
        j: int,
        reader: Reader,
        rows: Tensor,
        maxima: Tensor,
        offset: Tensor,
        groups: Tensor | None = None,
    ) -> None:
        """Collect the items of a block that may be among the best, given its groups' maxima."""
        columns, positions, logits = reader.above(maxima, self._floor(rows) - offset, groups)
        self.found.append((rows[columns], positions, logits + offset[columns]))
        self._count(j, reader, len(rows))

    def _count(self, j: int, reader: Reader, n_rows: int) -> None:
        self.tail_rows += reader.rows_read * n_rows if j else 0

    # -- into order --------------------------------------------------------------------------------

    def _rank(self, rows: Tensor, positions: Tensor, scores: Tensor) -> TopK:
        """The best of candidates, `[C], [C], [C]`, among which are the best of all items."""
        real = (rows < self.n_rows) & ~self.barred.hit(rows, positions, self.weights.n_items)
        rows, positions, scores = rows[real], positions[real], scores[real]
        counts = torch.bincount(rows, minlength=self.n_rows)
        if int(counts.min()) < self.k:
            raise CompressionError(
                "Expected scores to be finite numbers, but they overflow; the hidden states or "
                "the weights of the item table are far too large."
            )
        many = counts > max(8 * self.k, 1024)  # ties without end
        if many.any():
            few = ~many[rows]
            rows, positions, scores = rows[few], positions[few], scores[few]
            counts = counts.masked_fill(many, 0)
        order = rows.argsort()
        rows = rows[order]
        column = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        width = max(self.k, int(counts.max()))
        table = scores.new_full((self.n_rows, width), -torch.inf)
        table[rows, column] = scores[order]
        places = positions.new_zeros(self.n_rows, width)
        places[rows, column] = positions[order]
        best, at = table.topk(min(self.k + 1, width), dim=1)
        result = TopK(self.items(places.gather(1, at[:, : self.k])), best[:, : self.k].contiguous())
        doubt = self.doubt(slice(self.n_rows)).unsqueeze(1)
        close = (best[:, :-1] - best[:, 1:] <= doubt).any(1)
        close = (close & ~many).nonzero().squeeze(1)
        self.settle(result, close, places[close], table[close] > -torch.inf)
        self.sort_exactly(result, many.nonzero().squeeze(1))
        return result


def _reaching(upper: Tensor, floor: Tensor) -> Tensor:
    """Groups with a bound that reaches the floor of some row, `[G, B], [B] -> [G']`."""
    return ((upper - floor).amax(1) >= 0).nonzero().squeeze(1)


def _log_sum(strip: Strip, hidden: Tensor) -> Tensor:
    """Log of the summed exponentials of a strip's logits, `[B, d] -> [B]`."""
    query, nothing = strip.query(hidden).T.contiguous(), Barred.nothing(hidden.device)
    return Reader(strip, query, nothing, _GROUP).maxima_and_log_sum()[1]
