"""Exact top-k over a factorised catalogue (CpRec, section 3.2), in operations of torch.

A first pass in the model's precision finds what an item must reach, a second one every item that
rounding could let into the result. Scores of these candidates are computed in float64, each from
its own products alone, rounded to the model's precision and sorted, equal ones by lower item id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cprec_recbole.search.compiled import compiled_search
from cprec_recbole.search.table import Rows, SearchTable
from cprec_recbole.search.topk import Found, Limits, TopK, not_finite

_BATCH = 256  # rows of a batch that are searched together
_PIECE = 2**19  # logits at a time: 2 MiB in float32, which stay in a processor's cache
_FEW_LOGITS = 2**22  # that are kept between the passes
_MOST = 2**21  # candidates of several rows that are kept together
_PAIRS = 2**14  # scored in float64 at a time


def search(table: SearchTable, hidden: Tensor, limits: Limits) -> Found:
    """The k best items of each row, of hidden states `[B, d]`. A CompressionError for hidden states
    that are not finite numbers, or scores that overflow.

    The items do not depend on the batch, on pieces or on an index, and neither do the scores of a
    flat softmax. A tree's scores may, in the last digit: normalisers are sums in the model's
    precision, and in float64 only for rows whose order could depend on them.
    """
    if not len(hidden):
        scores = hidden.new_empty(0, limits.k, dtype=table.dtype)
        return Found(TopK(scores.long(), scores), 0.0)
    compiled = compiled_search(table)
    if compiled is not None:
        return compiled.search(hidden, limits)
    everyone = torch.arange(len(hidden), device=hidden.device)
    size = max(1, min(_BATCH, 2**18 // limits.k))
    return Found(_topk_of_some(table, hidden.double(), limits, everyone.split(size)), 1.0)


@torch.no_grad()
def _topk_of_some(
    table: SearchTable, hidden: Tensor, limits: Limits, parts: Iterable[Tensor]
) -> TopK:
    """The k best of some rows, part by part."""
    found = []
    for rows in parts:
        part = _Part(table, hidden[rows], limits.of_rows(rows))
        try:
            found.append(part.topk())
        except TooManyCandidates:
            halves = torch.arange(len(rows), device=rows.device).chunk(2)
            found.append(_topk_of_some(table, part.hidden, part.limits, halves))
    return found[0] if len(found) == 1 else TopK(*(torch.cat(each) for each in zip(*found)))


class TooManyCandidates(Exception):
    """So many items tie for the last place that those of several rows cannot be kept together."""


class _Piece(NamedTuple):
    """Rows of a block from `start` on, and their logits `[B, m]`."""

    block: int
    rows: Rows
    start: int
    logits: Tensor


class _Part:
    """Some rows of a batch that are searched together.

    In a block, score = logit + offset. A flat softmax has no offsets; a tree's are minus the head's
    normaliser, and a cluster's log-probability minus its block's normaliser.
    """

    def __init__(self, table: SearchTable, hidden: Tensor, limits: Limits) -> None:
        self.table, self.hidden, self.limits = table, hidden, limits
        self.offsets = hidden.new_zeros(len(hidden), len(table.blocks))  # float64
        self.slack = torch.linalg.vector_norm(hidden, dim=1) * table.rounding
        if table.clusters is not None:
            self.clusters = (hidden.unsqueeze(1) * table.clusters).sum(2)
            # normalisers are off by as much as logits, and by what rounding does to their sums
            scale = torch.linalg.vector_norm(hidden, dim=1) * table.longest
            scale += math.log(table.partition.n_items)
            self.slack = 2 * self.slack + 16 * torch.finfo(table.dtype).eps * scale
        if not (self.slack < torch.finfo(table.dtype).max).all():
            raise not_finite(hidden)

    def topk(self) -> TopK:
        """The result."""
        table, k = self.table, self.limits.k
        pieces = self._kept(table.blocks)
        if table.clusters is not None:
            log_sums = self.hidden.new_full(self.offsets.shape, -torch.inf)
            for block, _, _, logits in pieces():
                own = logits.logsumexp(1).double()
                log_sums[:, block] = torch.logaddexp(log_sums[:, block], own)
            self.offsets = self._offsets(log_sums, self.clusters)
        if self.limits.allowed is not None:
            pieces = self._kept([block.pick(self.limits.allowed) for block in table.blocks])
        best = self.hidden.new_full((len(self.hidden), k), -torch.inf, dtype=table.dtype)
        for piece in pieces():
            best = torch.cat([best, self._scores(piece)], 1).topk(k, dim=1).values
        floor = (best[:, -1:] - self.slack.unsqueeze(1)).to(table.dtype)
        found, n_found = [], 0
        for piece in pieces():
            rows, columns = (self._scores(piece) >= floor).nonzero(as_tuple=True)
            found.append((rows, piece.rows.positions(piece.start + columns)))
            n_found += len(rows)
            if len(self.hidden) > 1 and n_found > _MOST:
                raise TooManyCandidates
        return self._sorted(*(torch.cat(each) for each in zip(*found)))

    def _kept(self, blocks: list[Rows]) -> Callable[[], Iterable[_Piece]]:
        """What gives all logits of some blocks; they are made once if they are few."""
        n_logits = len(self.hidden) * sum(len(block.values) for block in blocks)
        if n_logits > _FEW_LOGITS:
            return lambda: self._pieces(blocks)
        pieces = list(self._pieces(blocks))
        return lambda: pieces

    def _pieces(self, blocks: list[Rows]) -> Iterator[_Piece]:
        width = max(1, _PIECE // len(self.hidden))
        for number, block in enumerate(blocks):
            query = (self.hidden @ block.basis).to(self.table.dtype)
            for start in range(0, len(block.values), width):
                yield _Piece(number, block, start, query @ block.values[start : start + width].T)

    def _scores(self, piece: _Piece) -> Tensor:
        """Scores of a piece in the model's precision, `[B, m]`; -inf for what is left out."""
        scores = piece.logits + self.offsets[:, piece.block, None].to(piece.logits.dtype)
        if len(self.limits.excluded):
            owners, positions = self.limits.pairs()
            columns = piece.rows.find(positions) - piece.start
            here = (columns >= 0) & (columns < scores.shape[1])
            scores[owners[here], columns[here]] = -torch.inf
        return scores

    def _offsets(self, log_sums: Tensor, clusters: Tensor) -> Tensor:
        """A tree's offsets, given the normaliser of each block, `[B, n_blocks]`, and the logits of
        its clusters."""
        head = -torch.cat([log_sums[:, :1], clusters], 1).logsumexp(1, keepdim=True)
        return torch.cat([head, head + clusters - log_sums[:, 1:]], 1)

    # -- candidates: rows of the batch and positions, `[M], [M]` -----------------------------------

    def _sorted(self, rows: Tensor, positions: Tensor) -> TopK:
        """The k best of each row's candidates."""
        table, k = self.table, self.limits.k
        items = table.partition.item_at[positions].long()
        by_id = items.argsort()
        rows, positions, items = rows[by_id], positions[by_id], items[by_id]
        logits, blocks = self._exact_logits(rows, positions), table.partition.blocks(positions)
        scores, order = self._in_order(rows, blocks, logits)
        if table.clusters is not None:
            unsure = self._unsure(rows[order], blocks[order], scores[order])
            if len(unsure):
                self.offsets[unsure] = self._exact_offsets(unsure)
                scores, order = self._in_order(rows, blocks, logits)
        counts = torch.bincount(rows, minlength=len(self.hidden))
        if int(counts.min()) < k:
            raise not_finite(self.hidden)
        first = (counts.cumsum(0) - counts).unsqueeze(1)
        chosen = order[first + torch.arange(k, device=rows.device)]
        best = scores[chosen].to(table.dtype)
        if not best.isfinite().all():
            raise not_finite(self.hidden)
        return TopK(items[chosen], best)

    def _in_order(self, rows: Tensor, blocks: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores in float64, and an order by row and then by what they are when rounded."""
        scores = logits + self.offsets[rows, blocks]
        order = scores.to(self.table.dtype).argsort(descending=True, stable=True)
        return scores, order[rows[order].argsort(stable=True)]

    def _exact_logits(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Logits in float64, each the sum of its own products."""
        logits = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        for block in self.table.blocks:
            query, places = block.exact_query(self.hidden), block.find(positions)
            for some in (places >= 0).nonzero().squeeze(1).split(_PAIRS):
                codes = block.values[places[some]]
                logits[some] = (codes * query[rows[some]]).sum(1)
        return logits

    def _exact_offsets(self, rows: Tensor) -> Tensor:
        """Offsets of some rows in float64, each row's on its own, `[m, n_blocks]`."""
        log_sums = []
        for block in self.table.blocks:
            queries, parts = block.exact_query(self.hidden[rows]), block.values.split(_PAIRS)
            sums = [torch.stack([(p.double() @ q).logsumexp(0) for q in queries]) for p in parts]
            log_sums.append(torch.stack(sums).logsumexp(0))
        return self._offsets(torch.stack(log_sums, 1), self.clusters[rows])

    def _unsure(self, rows: Tensor, blocks: Tensor, scores: Tensor) -> Tensor:
        """Rows whose order errors of the offsets could change, given sorted candidates: that of two
        blocks, or in one where it decides to which numbers scores are rounded."""
        gap = scores.diff().abs()
        digits = 4 * torch.finfo(self.table.dtype).eps * scores[:-1].abs()
        across = (blocks.diff() != 0) & (gap <= self.slack[rows[:-1]])
        near = ((gap > 0) & (gap <= digits) | across) & (rows.diff() == 0)
        return rows[:-1][near].unique()
