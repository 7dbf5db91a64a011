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
from cprec_recbole.partition import PADDING
from cprec_recbole.search.bounds import Reach
from cprec_recbole.search.reading import Candidates, Reader, TooManyCandidates, log_sum_of
from cprec_recbole.search.settle import PIECE, Rows, Weights, sort_topk
from cprec_recbole.search.sorting import Sorted, is_sorted_sooner
from cprec_recbole.search.strips import GroupedStrip, PickedStrip, Strip
from cprec_recbole.search.topk import Barred, TopK, not_finite

_ROWS = 256  # rows of a batch that are searched together
_LANES = 32  # rows of a batch that read the same groups; fewer leave vector units idle
_FEW = 2**18  # logits that are sooner looked at again than computed again


class Found(NamedTuple):
    """A search's result, and what it took.

    Attributes:
        topk: the result.
        tail_share: rows of the tail that were read for a row of the batch, on average, as a share
            of all; one that was read twice counts twice.
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
        CompressionError: hidden states that are not finite numbers, or scores that overflow.
    """
    hidden = hidden.double()
    if not hidden.isfinite().all():
        raise not_finite()
    n_rows = len(hidden)
    n_items = weights.n_items - 1 if allowed is None else len(allowed)
    is_sorted = is_sorted_sooner(n_items, n_rows, k)
    most = max(1, 2 * PIECE // n_items) if is_sorted else max(1, min(_ROWS, 2**18 // k))
    strips: Sequence[Strip] = weights.whole if is_sorted else weights.indexed
    if allowed is not None:
        strips = [PickedStrip(strip, allowed) for strip in weights.whole]
    way = Sorted if is_sorted else _Searched
    size = -(-n_rows // max(1, -(-n_rows // most)))  # parts of equal size
    parts, tail_rows = [], 0
    for start in range(0, n_rows, max(1, size)):
        part = hidden[start : start + size] if size < n_rows else hidden
        some = barred.of_rows(start, start + size) if size < n_rows else barred
        rows = way(weights, strips, part, k, some, allowed)
        parts.append(rows.topk())
        tail_rows += rows.tail_rows
    if not parts:
        parts = [TopK(hidden.new_empty(0, k).long(), hidden.new_empty(0, k).to(weights.dtype))]
    topk = parts[0] if len(parts) == 1 else TopK(*(torch.cat(part) for part in zip(*parts)))
    if not topk.scores.isfinite().all():
        raise _overflow()
    return Found(topk, tail_rows / max(1, n_rows * weights.n_tail))


class _Searched(Rows):
    """The head is read, then what of the other blocks may hold one of the best.

    Arrays have the batch last, in lanes: its rows, then fillers, from `n_rows` on. A filler's
    hidden state is zero and its floor is infinite (`best`), so that no item of its is ever wanted
    or kept.
    """

    def topk(self) -> TopK:
        """The result."""
        lanes = self.n_rows + (-self.n_rows % _LANES if self.n_rows > 1 else 0)
        self._widen(lanes + (_LANES if self.n_rows > 1 else 0))
        self.columns = [query.T.contiguous() for query in self.queries()]  # [r, B]
        self.best = self.slack.new_full((self.k, len(self.hidden)), -torch.inf)
        self.best[:, self.n_rows :] = torch.inf
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, positions, scores
        everyone = torch.arange(len(self.hidden), device=self.hidden.device)
        try:
            for j, strip in enumerate(self.strips):
                if isinstance(strip, GroupedStrip):
                    self._read_grouped(j, strip, everyone)
                else:
                    self._read_whole(j, everyone[:lanes])
        except TooManyCandidates:
            rows = self.hidden[: self.n_rows]
            return sort_topk(self.weights, rows, self.k, self.barred, self.allowed)
        return self._rank(*(torch.cat(part) for part in zip(*self.found)))

    # -- reading -----------------------------------------------------------------------------------

    def _read_whole(self, j: int, rows: Tensor) -> None:
        """Read all of a block for some rows of the batch."""
        reader, offset = self._reader(j, rows), None
        if not self.is_tree and reader.n_logits() <= _FEW:
            logits = reader.logits()
            self._raise_floor(rows, logits)
            self._keep(j, rows, reader, reader.among(logits, self._floor(rows)))
            return
        if not self.is_tree:
            maxima = scores = reader.maxima()
        else:
            if self.allowed is None:
                maxima, log_sum = reader.maxima_and_log_sum()
            else:
                maxima, log_sum = (
                    reader.maxima(),
                    log_sum_of(self.weights.whole[j], self.hidden[rows]),
                )
            offset = self.offset(j, rows, log_sum)
            scores = maxima + offset
        self._raise_floor(rows, scores)
        floor = self._floor(rows) if offset is None else self._floor(rows) - offset
        self._keep(j, rows, reader, reader.above(maxima, floor), offset)

    def _read_grouped(self, j: int, strip: GroupedStrip, everyone: Tensor) -> None:
        """Read those groups of a block that may hold one of the best."""
        query, floor = self.columns[j], self._floor(everyone)
        reach = Reach.of(query)
        if self.is_tree:  # its normaliser is at least this
            floor = floor - self.offset(j, everyone, strip.branches.log_sum_below(query))
        upper = strip.branches.above(reach)
        rows = ((upper - floor).amax(0) >= 0).nonzero().squeeze(1)
        if not len(rows):
            return
        if self.n_rows > 1:  # those that look for near items beside each other, to read the same
            rows = self._filled(rows[upper[:, rows].argmax(0).argsort()])
        opened = [
            self._read_near(j, strip, some, Reach(reach.ball[:, some], reach.box[:, some]))
            for some in rows.split(_LANES)
        ]
        if self.is_tree:
            rows = torch.cat(opened)
            if len(rows):
                self._read_whole(j, self._filled(rows))

    def _read_near(self, j: int, strip: GroupedStrip, rows: Tensor, reach: Reach) -> Tensor:
        """Read the groups of a block that may hold one of the best of any of these rows.

        In a tree scores need the block's normaliser, and that all of the block. What bounds say
        of it is enough to see that an item will not do; the rows where one may are returned.
        """
        reader, floor = self._reader(j, rows), self._floor(rows)
        if self.is_tree:
            floor = floor - self.offset(j, rows, strip.bounds.log_sum_below(reader.query))
        upper = strip.bounds.above(reach)
        groups = _reaching(upper, floor)
        if not len(groups):
            return rows[:0]
        if self.is_tree:
            best = reader.maxima(groups)
            self._count(j, reader, rows)
            return rows[(best >= floor).any(0)]
        if reader.n_logits(groups) > _FEW:  # the most promising first, to raise the floor
            lowest = torch.where(floor == -torch.inf, upper.amin(0), floor)
            first = _reaching(upper, torch.maximum(floor, (3 * upper.amax(0) + lowest) / 4))
            few = reader.n_logits(first) <= PIECE
            self._raise_floor(rows, reader.logits(first) if few else reader.maxima(first))
            floor = self._floor(rows)
            groups = _reaching(upper, floor)
        if reader.n_logits(groups) > _FEW:
            found = reader.above(reader.maxima(groups), floor, groups)
        else:
            found = reader.among(reader.logits(groups), floor, groups)
        self._keep(j, rows, reader, found)
        return rows[:0]

    def _widen(self, n: int) -> None:
        """Add rows of zeros; `n_rows` stays what it was."""
        if n > len(self.hidden):
            zeros = self.hidden.new_zeros(n - len(self.hidden), self.hidden.shape[1])
            self.set_hidden(torch.cat([self.hidden, zeros]))

    def _filled(self, rows: Tensor) -> Tensor:
        """Rows of the batch, and enough others that want nothing to fill the last lane."""
        fill = -len(rows) % _LANES if self.n_rows > 1 else 0
        others = torch.arange(len(self.hidden) - fill, len(self.hidden), device=rows.device)
        return torch.cat([rows[rows < self.n_rows], others]) if fill else rows

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
        self, j: int, rows: Tensor, reader: Reader, found: Candidates, offset: Tensor | None = None
    ) -> None:
        """Collect items that may be among the best."""
        columns, positions, logits = found
        scores = logits if offset is None else logits + offset[columns]
        self.found.append((rows[columns], positions, scores))
        self._count(j, reader, rows)

    def _count(self, j: int, reader: Reader, rows: Tensor) -> None:
        if j:
            self.tail_rows += reader.rows_read * int((rows < self.n_rows).sum())

    # -- into order --------------------------------------------------------------------------------

    def _rank(self, rows: Tensor, positions: Tensor, scores: Tensor) -> TopK:
        """The best of candidates, `[C], [C], [C]`, among which are the best of all items."""
        real = positions != PADDING
        if len(self.barred.rows):
            real &= ~self.barred.hit(rows, positions, self.weights.n_items)
        rows, positions, scores = rows[real], positions[real], scores[real]
        counts = torch.bincount(rows, minlength=self.n_rows)
        least, width = (int(bound) for bound in counts.aminmax())
        if least < self.k:
            raise _overflow()
        many = counts > max(8 * self.k, 1024)  # ties without end
        if width > max(8 * self.k, 1024):
            few = ~many[rows]
            rows, positions, scores = rows[few], positions[few], scores[few]
            counts = counts.masked_fill(many, 0)
            width = max(self.k, int(counts.max()))
        table, places = scores.unsqueeze(0), positions.unsqueeze(0)
        if self.n_rows > 1 or not len(rows):
            order = rows.argsort()
            rows = rows[order]
            column = torch.arange(len(rows), device=rows.device)
            column -= (counts.cumsum(0) - counts)[rows]
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


def _overflow() -> CompressionError:
    return CompressionError(
        "Expected scores to be finite numbers, but they overflow; the hidden states or the weights "
        "of the item table are far too large."
    )


def _reaching(upper: Tensor, floor: Tensor) -> Tensor:
    """Groups with a bound that reaches the floor of some row, `[G, B], [B] -> [G']`."""
    return ((upper - floor).amax(1) >= 0).nonzero().squeeze(1)
