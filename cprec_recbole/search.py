"""Exact top-k over a factorised catalogue, most of which is not read (CpRec, section 3.2).

A first pass in the model's precision finds every item that rounding could let into the result;
where two places are closer than rounding errors, `settle` decides. So the result is that of a dense
sort, equal scores by lower item id, whatever the batch, the pieces or the index.
"""

from __future__ import annotations

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
_SORT_GROUP = 16  # scores of which the best is looked at first
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
        hidden: hidden states, finite, `[B, d]`.
        k: at most as many as each row has items left.
        barred: what each row must not get.
        allowed: positions of the only items that rows may get, sorted; None for all.
    """
    n_rows = len(hidden)
    if not n_rows:
        nothing = torch.empty(0, k, device=hidden.device)
        return Found(TopK(nothing.long(), nothing.to(weights.dtype)), 0.0)
    n_items = weights.n_items - 1 if allowed is None else len(allowed)
    is_sorted = n_items <= _SORTED[0] or n_items * n_rows <= _SORTED[1] or 16 * k > n_items
    most = max(1, 2 * PIECE // n_items) if is_sorted else max(1, min(_ROWS, 2**18 // k))
    strips: Sequence[Strip] = weights.whole if is_sorted else weights.indexed
    if allowed is not None:
        strips = [PickedStrip(strip, allowed) for strip in weights.whole]
    size = -(-n_rows // -(-n_rows // most))  # in parts of equal size
    parts, tail_rows = [], 0
    for start in range(0, n_rows, size):
        part = hidden[start : start + size].double()
        some = barred.of_rows(start, start + len(part)) if size < n_rows else barred
        rows = (_Sorted if is_sorted else _Searched)(weights, strips, part, k, some, allowed)
        parts.append(rows.topk())
        tail_rows += rows.tail_rows
    n_tail = sum(strip.n_items for strip in weights.whole[1:])
    topk = parts[0] if len(parts) == 1 else TopK(*(torch.cat(part) for part in zip(*parts)))
    return Found(topk, tail_rows / max(1, n_tail * n_rows))


class _Sorted(Rows):
    """All items are scored and sorted: for small catalogues, and where much of one is wanted."""

    def topk(self) -> TopK:
        """The result."""
        sizes = [strip.n_items for strip in self.strips]
        n_items = sum(sizes)
        group = _SORT_GROUP if self.n_rows > 1 and n_items > 8 * _SORT_GROUP * self.k else 1
        fill = -n_items % group
        scores = self.hidden.new_empty((n_items + fill, self.n_rows), dtype=self.weights.dtype)
        *blocks, rest = scores.split([*sizes, fill])
        rest.fill_(-torch.inf)
        for strip, query, block in zip(self.strips, self.queries(), blocks):
            torch.mm(strip.codes, query, out=block)
        if self.is_tree:
            self._into_log_probabilities(blocks)
        if self.barred.rows.numel():
            for strip, block in zip(self.strips, blocks):
                inside, rows = strip.find(self.barred.positions)
                block[rows, self.barred.rows[inside]] = -torch.inf
        self.tail_rows = sum(sizes[1:]) * self.n_rows
        # a few more than asked for, which are enough to settle all but long ties
        best, rows = _best_rows(scores, min(self.k + _SPARE, n_items), group)
        rows = rows.T
        positions = rows + 1 if self.allowed is None else self.allowed[rows]
        items = self.weights.partition.item_at[positions[:, : self.k]].long()
        doubt = self.doubt()
        close = (best[: self.k + 1].diff(dim=0) >= -doubt).any(0)
        result = TopK(items, best[: self.k].T)
        if close.any():
            result = TopK(items, result.scores.clone())
            many = close & (best[-1] >= best[self.k - 1] - doubt) & (len(best) < n_items)
            some = (close & ~many).nonzero().squeeze(1)
            self.settle(result, some, positions[some], best.T[some] > -torch.inf)
            self.sort_exactly(result, many.nonzero().squeeze(1))
        return result

    def _into_log_probabilities(self, blocks: Sequence[Tensor]) -> None:
        everyone = torch.arange(self.n_rows, device=self.hidden.device)
        for j, block in enumerate(blocks):
            if self.allowed is None:
                log_sum = block.logsumexp(0)
            else:
                log_sum = _log_sum(self.weights.whole[j], self.hidden)
            block += self.offset(j, everyone, log_sum)


class _Searched(Rows):
    """The head is read, then what of the other blocks may hold one of the best."""

    def topk(self) -> TopK:
        """The result."""
        if self.n_rows > 1:  # fill the lanes; what the last row gets more than once is dropped
            self._widen(-self.n_rows % _LANES)
        self.codes = self.queries()
        self.best = self.slack.new_full((self.k, len(self.hidden)), -torch.inf)
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, positions, scores
        everyone = torch.arange(len(self.hidden), device=self.hidden.device)
        try:
            for j, strip in enumerate(self.strips):
                if not isinstance(strip, GroupedStrip):
                    self._read_whole(j, everyone)
                    continue
                lanes = strip.by_likeness(self.codes[j]).split(_LANES)
                if not self.is_tree:
                    for rows in lanes:
                        self._read_near(j, strip, rows)
                    continue
                rows = torch.cat([self._worth_opening(j, strip, rows) for rows in lanes])
                if len(rows):
                    fill = -len(rows) % _LANES if self.n_rows > 1 else 0
                    self._read_whole(j, torch.cat([rows, rows[-1:].expand(fill)]), len(rows))
        except TooManyCandidates:
            rows = self.hidden[: self.n_rows]
            return sort_topk(self.weights, rows, self.k, self.barred, self.allowed)
        return self._rank(*(torch.cat(part) for part in zip(*self.found)))

    def _widen(self, n: int) -> None:
        spare = self.hidden[-1:].expand(n, -1)
        n_rows = self.n_rows
        wide = torch.cat([self.hidden, spare])
        super().__init__(self.weights, self.strips, wide, self.k, self.barred, self.allowed)
        self.n_rows = n_rows

    def _read_whole(self, j: int, rows: Tensor, n_real: int | None = None) -> None:
        """Read all of a block for some rows of the batch; those after `n_real` only fill lanes."""
        reader = self._reader(j, rows)
        offset: Tensor | float = 0.0
        if not self.is_tree:
            maxima = reader.maxima()
        elif self.allowed is None:
            maxima, log_sum = reader.maxima_and_log_sum()
            offset = self.offset(j, rows, log_sum)
        else:
            maxima, offset = reader.maxima(), self.offset(j, rows, _log_sum(self.weights.whole[j], self.hidden[rows]))
        n_real = len(rows) if n_real is None else n_real
        rows, maxima = rows[:n_real], maxima[:, :n_real]
        offset = offset if isinstance(offset, float) else offset[:n_real]
        self._raise_floor(rows, maxima + offset)
        self._keep(j, reader, rows, maxima, offset)

    def _read_near(self, j: int, strip: GroupedStrip, rows: Tensor) -> None:
        """Read the groups of a block that may hold one of the best of any of these rows."""
        reader = self._reader(j, rows)
        query, floor = reader.query[:-1], self._floor(rows)
        branches = _reaching(strip.branch_bounds.above(query), floor)
        if not len(branches):
            return
        groups = strip.groups_of(branches)
        upper = strip.bounds_of(groups).above(query)
        # the most promising groups first, to raise the floor for the others
        lowest = torch.where(floor == -torch.inf, upper.amin(0), floor)
        first = _reaching(upper, torch.maximum(floor, (3 * upper.amax(0) + lowest) / 4))
        if not len(first):
            return
        self._raise_floor(rows, reader.logits_or_maxima(groups[first]))
        groups = groups[_reaching(upper, self._floor(rows))]
        self._keep(j, reader, rows, reader.maxima(groups), 0.0, groups)

    def _worth_opening(self, j: int, strip: GroupedStrip, rows: Tensor) -> Tensor:
        """Those rows for which a block of a tree may hold one of the best.

        Scores need the block's normaliser, and that all of the block. It is at least what the
        bounds say, which is enough to see that an item will not do.
        """
        reader = self._reader(j, rows)
        query, floor = reader.query[:-1], self._floor(rows)
        offset = self.offset(j, rows, strip.branch_bounds.log_sum_below(query))
        branches = _reaching(strip.branch_bounds.above(query), floor - offset)
        if not len(branches):
            return rows[:0]
        floor = floor - self.offset(j, rows, strip.bounds.log_sum_below(query))
        groups = strip.groups_of(branches)
        groups = groups[_reaching(strip.bounds_of(groups).above(query), floor)]
        best = reader.maxima(groups)
        self._count(j, reader, len(rows))
        return rows[(best >= floor).any(0)]

    def _reader(self, j: int, rows: Tensor) -> Reader:
        # larger groups mean fewer maxima to sort, and more rows to read again for each of the best
        n_rows, rank = self.strips[j].codes.shape
        group = max(1, min(round((2 * n_rows / (self.k * rank)) ** 0.5), n_rows // (8 * self.k)))
        barred = self.barred.pick(rows, len(self.hidden))
        return Reader(self.strips[j], self.codes[j][:, rows], barred, group)

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
        offset: Tensor | float,
        groups: Tensor | None = None,
    ) -> None:
        """Collect the items of a block that may be among the best, given its groups' maxima."""
        columns, positions, logits = reader.above(maxima, self._floor(rows) - offset, groups)
        scores = logits + (offset if isinstance(offset, float) else offset[columns])
        self.found.append((rows[columns], positions, scores))
        self._count(j, reader, len(rows))

    def _count(self, j: int, reader: Reader, n_rows: int) -> None:
        self.tail_rows += reader.rows_read * n_rows if j else 0

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
        items = self.weights.partition.item_at[places.gather(1, at[:, : self.k])].long()
        result = TopK(items, best[:, : self.k].contiguous())
        doubt = self.doubt(slice(self.n_rows)).unsqueeze(1)
        close = (best[:, :-1] - best[:, 1:] <= doubt).any(1)
        close = (close & ~many).nonzero().squeeze(1)
        self.settle(result, close, places[close], table[close] > -torch.inf)
        self.sort_exactly(result, many.nonzero().squeeze(1))
        return result


def _log_sum(strip: Strip, hidden: Tensor) -> Tensor:
    """Log of the summed exponentials of a strip's logits, `[B, d] -> [B]`."""
    nothing = Barred.nothing(hidden.device)
    return Reader(strip, strip.query(hidden), nothing, _GROUP).maxima_and_log_sum()[1]


def _reaching(upper: Tensor, floor: Tensor) -> Tensor:
    """Groups with a bound that reaches the floor of some row, `[G, B], [B] -> [G']`."""
    return ((upper - floor).amax(1) >= 0).nonzero().squeeze(1)


def _best_rows(scores: Tensor, k: int, group: int) -> tuple[Tensor, Tensor]:
    """The k best of each column and their rows, `[N, B] -> [k, B], [k, B]`.

    By the best of each group of rows first: the k best are in the k groups that are best so.
    """
    if group == 1:
        return scores.topk(k, dim=0)
    grouped = scores.view(-1, group, scores.shape[1])
    groups = grouped.amax(1).topk(k, dim=0).indices  # [k, B]
    columns = torch.arange(scores.shape[1], device=scores.device)
    some = grouped.transpose(1, 2)[groups, columns].transpose(1, 2)  # [k, group, B]
    best, at = some.flatten(0, 1).topk(k, dim=0)
    return best, groups.gather(0, at // group) * group + at % group
