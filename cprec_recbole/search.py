"""Exact top-k over a factorised catalogue, most of which is not read (CpRec, section 3.2).

A first pass in the model's precision finds every item that rounding could let into the result;
where two places are closer than rounding errors, they are settled in float64. So the result is
that of a dense sort, equal scores by lower item id, whatever the batch, the pieces or the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.reading import Reader, TooManyCandidates
from cprec_recbole.settle import PIECE, Weights, dense_topk, exact_scores
from cprec_recbole.strips import GroupedStrip, PickedStrip, Strip
from cprec_recbole.topk import Barred, TopK

LANES = 32  # rows of a batch that read the same groups; fewer leave vector units idle
_ROWS = 256  # rows of a batch that are searched together
_SORTED = 2**17  # scores that are sooner sorted than searched
_GROUP = 32  # rows of a plain strip of which the best is kept


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
    n_items = weights.n_items - 1 if allowed is None else len(allowed)
    is_sorted = len(hidden) * n_items <= _SORTED or 16 * k > n_items
    size = max(1, PIECE // n_items) if is_sorted else max(1, min(_ROWS, 2**18 // k))
    strips: Sequence[Strip] = weights.whole if is_sorted else weights.indexed
    if allowed is not None:
        strips = [PickedStrip(strip, allowed) for strip in weights.whole]
    parts, tail_rows = [], 0
    for start in range(0, max(1, len(hidden)), size):
        rows = hidden[start : start + size].double()
        some = barred.of_rows(start, start + len(rows)) if len(rows) < len(hidden) else barred
        batch = _Batch(weights, strips, rows, k, some, allowed)
        parts.append(batch.sort() if is_sorted else batch.search())
        tail_rows += batch.tail_rows
    topk = parts[0] if len(parts) == 1 else TopK(*(torch.cat(part) for part in zip(*parts)))
    n_tail = sum(strip.n_items for strip in weights.whole[1:])
    return Found(topk, tail_rows / max(1, n_tail * len(hidden)))


class _Batch:
    """The search for some rows of a batch.

    In a block, score = logit + offset. A flat softmax has no offsets; a tree's are minus the head's
    normaliser, and a cluster's log-probability minus its block's normaliser.

    Args:
        weights: the head's.
        strips: what to search, a strip for each block.
        hidden: hidden states in float64, `[B, d]`.
        k: how many items.
        barred: what each row must not get.
        allowed: positions that the strips are limited to; None for all.
    """

    def __init__(
        self,
        weights: Weights,
        strips: Sequence[Strip],
        hidden: Tensor,
        k: int,
        barred: Barred,
        allowed: Tensor | None,
    ) -> None:
        self.weights, self.strips, self.k = weights, strips, k
        self.barred, self.allowed = barred, allowed
        self.n_rows, self.tail_rows = len(hidden), 0
        self.eps = torch.finfo(weights.dtype).eps
        self.is_tree = weights.clusters is not None
        self._set_hidden(hidden)

    def _set_hidden(self, hidden: Tensor) -> None:
        self.hidden = hidden
        # scores that are closer than this may be in either order
        rounding = max(strip.rounding for strip in self.strips)
        self.slack = (hidden.norm(dim=1) * (2 * rounding)).to(self.weights.dtype)
        if self.weights.clusters is not None:
            self.branches = hidden @ self.weights.clusters.T  # [B, n_blocks - 1]
            self.offsets = hidden.new_zeros(len(self.strips), len(hidden))

    # Small catalogues, and results that hold much of one

    def sort(self) -> TopK:
        """Score every item and sort."""
        sizes = [strip.n_items for strip in self.strips]
        scores = torch.empty(
            sum(sizes), self.n_rows, dtype=self.weights.dtype, device=self.hidden.device
        )
        blocks = scores.split(sizes)
        for strip, block in zip(self.strips, blocks):
            torch.mm(strip.codes, strip.query(self.hidden), out=block)
        if self.is_tree:
            everyone = torch.arange(self.n_rows, device=scores.device)
            for j, block in enumerate(blocks):
                whole = self._log_sum(j, everyone) if self.allowed is not None else None
                block += self._offset(j, everyone, block.logsumexp(0) if whole is None else whole)
        if len(self.barred.rows):
            for strip, block in zip(self.strips, blocks):
                inside, rows = strip.find(self.barred.positions)
                block[rows, self.barred.rows[inside]] = -torch.inf
        self.tail_rows = sum(sizes[1:]) * self.n_rows
        best, rows = scores.topk(min(self.k + 1, len(scores)), dim=0)
        places = rows[: self.k] + 1 if self.allowed is None else self.allowed[rows[: self.k]]
        items = self.weights.partition.item_at[places].T.long()
        clear = (best[:-1] - best[1:] > self.slack).all(0)
        return self._with_exact_rows(TopK(items, best[: self.k].T), ~clear)

    # Large catalogues

    def search(self) -> TopK:
        """Read the head, then what of the other blocks may hold one of the best."""
        if self.n_rows > 1:  # fill the lanes; what the last row gets more than once is dropped
            spare = -self.n_rows % LANES
            self._set_hidden(torch.cat([self.hidden, self.hidden[-1:].expand(spare, -1)]))
        self.queries = [strip.query(self.hidden) for strip in self.strips]
        self.best = self.slack.new_full((self.k, len(self.hidden)), -torch.inf)
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, positions, scores
        everyone = torch.arange(len(self.hidden), device=self.hidden.device)
        try:
            for j, strip in enumerate(self.strips):
                if not isinstance(strip, GroupedStrip):
                    self._read_whole(j, everyone)
                    continue
                for rows in strip.by_likeness(self.queries[j]).split(LANES):
                    self._read_near(j, strip, rows)
        except TooManyCandidates:
            nothing = torch.zeros(self.n_rows, self.k, device=self.hidden.device)
            every = torch.ones(self.n_rows, dtype=torch.bool, device=self.hidden.device)
            return self._with_exact_rows(TopK(nothing.long(), nothing.to(self.weights.dtype)), every)
        return self._rank(*(torch.cat(part) for part in zip(*self.found)))

    def _read_whole(self, j: int, rows: Tensor, n_real: int | None = None) -> None:
        """Read all of a block for some rows of the batch; those after `n_real` only fill lanes."""
        reader = self._reader(j, rows)
        offset: Tensor | float = 0.0
        if not self.is_tree:
            maxima = reader.maxima()
        elif self.allowed is None:
            maxima, log_sum = reader.maxima_and_log_sum()
            offset = self._offset(j, rows, log_sum)
        else:
            maxima, offset = reader.maxima(), self._offset(j, rows, self._log_sum(j, rows))
        n_real = len(rows) if n_real is None else n_real
        rows, maxima = rows[:n_real], maxima[:, :n_real]
        offset = offset if isinstance(offset, float) else offset[:n_real]
        self._raise_floor(rows, maxima + offset)
        self._keep(j, reader, rows, maxima, offset)

    def _read_near(self, j: int, strip: GroupedStrip, rows: Tensor) -> None:
        """Read the groups of a block that may hold one of the best of any of these rows."""
        reader = self._reader(j, rows)
        upper = strip.bounds.above(reader.query[:-1])
        if self.is_tree:  # the block's normaliser is at least this, and known only once it is read
            log_sum = strip.bounds.log_sum_below(reader.query[:-1])
            upper += self._offset(j, rows, log_sum)
        floor, top = self._floor(rows), upper.amax(0)
        if not (top >= floor).any():
            return
        if self.is_tree:
            groups = (upper >= floor).any(1).nonzero().squeeze(1)
            best = reader.maxima(groups).amax(0) + self.offsets[j, rows].to(upper.dtype)
            self._count(j, reader, len(rows))
            rows = rows[best >= floor]
            if len(rows):
                fill = -len(rows) % LANES if len(self.hidden) > 1 else 0
                self._read_whole(j, torch.cat([rows, rows[-1:].expand(fill)]), len(rows))
            return
        # first the most promising groups, to raise the floor
        lowest = torch.where(floor == -torch.inf, upper.amin(0), floor)
        first = (upper >= torch.maximum(floor, (3 * top + lowest) / 4)).any(1).nonzero().squeeze(1)
        self._raise_floor(rows, reader.logits_or_maxima(first))
        groups = (upper >= self._floor(rows)).any(1).nonzero().squeeze(1)
        self._keep(j, reader, rows, reader.maxima(groups), 0.0, groups)

    def _reader(self, j: int, rows: Tensor) -> Reader:
        group = max(1, min(_GROUP, len(self.strips[j].codes) // (8 * self.k)))
        barred = self.barred.pick(rows, len(self.hidden))
        return Reader(self.strips[j], self.queries[j][:, rows], barred, group)

    def _log_sum(self, j: int, rows: Tensor) -> Tensor:
        """Log of the summed exponentials of a whole block, also where only a part is searched."""
        strip = self.weights.whole[j]
        query, nothing = strip.query(self.hidden[rows]), Barred.nothing(rows.device)
        return Reader(strip, query, nothing, _GROUP).maxima_and_log_sum()[1]

    def _offset(self, j: int, rows: Tensor, log_sum: Tensor) -> Tensor:
        """Keep and return a block's offset, given the log of its summed exponentials, `[B]`."""
        if j == 0:
            branches = torch.cat([log_sum.double().unsqueeze(1), self.branches[rows]], dim=1)
            offset = -torch.logsumexp(branches, 1)
        else:
            offset = self.branches[rows, j - 1] + self.offsets[0, rows] - log_sum.double()
        self.offsets[j, rows] = offset
        rounded = offset.to(self.weights.dtype)
        self.slack[rows] += 8 * self.eps * rounded.abs()
        return rounded

    def _floor(self, rows: Tensor) -> Tensor:
        """What an item must reach to be among the k best, but for rounding, `[B]`."""
        return self.best[-1, rows] - self.slack[rows]

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

    # Into order

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
        close = (best[:, :-1] - best[:, 1:] <= self.slack[: self.n_rows].unsqueeze(1)).any(1)
        close = (close & ~many).nonzero().squeeze(1)
        if len(close):
            self._settle(result, close, places[close], table[close] > -torch.inf)
        return self._with_exact_rows(result, many)

    def _settle(self, result: TopK, rows: Tensor, places: Tensor, real: Tensor) -> None:
        """Put some rows of a result in order by the float64 scores of their candidates."""
        none = self.hidden.new_zeros(len(self.strips), len(rows))
        offsets = self.offsets[:, rows] if self.is_tree else none
        scores = exact_scores(self.weights, self.hidden[rows], offsets, places)
        scores = scores.to(self.weights.dtype).masked_fill(~real, -torch.inf)
        items = self.weights.partition.item_at[places].long()
        by_id = items.argsort(dim=1)
        scores, items = scores.gather(1, by_id), items.gather(1, by_id)
        best, at = scores.sort(dim=1, descending=True, stable=True)
        result.items[rows] = items.gather(1, at[:, : self.k])
        result.scores[rows] = best[:, : self.k]

    def _with_exact_rows(self, topk: TopK, unclear: Tensor) -> TopK:
        """Some rows replaced by those of a dense float64 sort, `[B] bool`."""
        rows = unclear.nonzero().squeeze(1)
        if len(rows):
            barred = self.barred.pick(rows, len(self.hidden))
            exact = dense_topk(self.weights, self.hidden[rows], self.k, barred, self.allowed)
            topk.items[rows], topk.scores[rows] = exact.items, exact.scores
        return topk
