"""Into order: what decides where two places are closer than rounding errors.

Scores in float64, rounded to the model's precision and sorted with equal ones by lower item id, are
the definition of a search's result; the search itself is a fast way to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cprec_recbole.partition import Partition
from cprec_recbole.search.strips import PlainStrip, Strip
from cprec_recbole.search.topk import Barred, TopK

_FEW_ITEMS = 2**15  # whose vectors may be kept
PIECE = 2**21  # numbers to work on at a time: 8 MiB in float32


@dataclass(frozen=True)
class Weights:
    """What a search reads.

    Attributes:
        partition: which item is where.
        whole: the blocks as they are.
        clusters: those of a tree, `[n_blocks - 1, d]`, float64; None for a flat softmax.
        indexed: the blocks with groups and bounds where there is an index, else as `whole`.
    """

    partition: Partition
    whole: Sequence[PlainStrip]
    clusters: Tensor | None
    indexed: Sequence[Strip]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of the first pass, and of scores."""
        return self.whole[0].codes.dtype

    @cached_property
    def n_items(self) -> int:
        """Items of the catalogue, padding included."""
        return self.partition.n_items

    @cached_property
    def real_items(self) -> Tensor:
        """Item ids in popularity order without padding, `[n_items - 1]`."""
        return self.partition.item_at[1:].long()

    @cached_property
    def vectors(self) -> Tensor | None:
        """Item vectors by position in float64, `[n_items, d]`; None unless there are few."""
        if self.n_items > _FEW_ITEMS:
            return None
        rows = [strip.codes.double() @ strip.basis.T for strip in self.whole]
        return torch.cat([rows[0].new_zeros(1, rows[0].shape[1]), *rows])

    @cached_property
    def n_tail(self) -> int:
        """Items outside the head."""
        return sum(strip.n_items for strip in self.whole[1:])

    @cached_property
    def joint_basis(self) -> tuple[Tensor, list[int], float]:
        """The bases of all blocks beside each other in the model's precision, `[d, sum r]`, their
        ranks, and twice what rounding may change in a logit that is computed with them."""
        bases = [strip.basis for strip in self.whole]
        ranks = [basis.shape[1] for basis in bases]
        rounding = 2 * max(strip.joint_rounding for strip in self.whole)
        return torch.cat(bases, dim=1).to(self.dtype), ranks, rounding


class Rows:
    """Some rows of a batch that are searched together.

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
        self.n_rows = len(hidden)
        self.tail_rows = 0  # products of a row of the tail and a row of the batch
        self.is_tree = weights.clusters is not None
        # twice what rounding may change in a logit, as two are compared
        self.rounding = 2 * max(strip.rounding for strip in strips)
        self.set_hidden(hidden)

    def set_hidden(self, hidden: Tensor) -> None:
        """Take other hidden states."""
        self.hidden = hidden
        if self.weights.clusters is not None:
            self.branches = hidden @ self.weights.clusters.T  # [B, n_blocks - 1]
            self.offsets = hidden.new_zeros(len(self.strips), len(hidden))
            # twice what rounding may change in the offsets
            self.blur = hidden.new_zeros(len(hidden), dtype=self.weights.dtype)

    @cached_property
    def slack(self) -> Tensor:
        """Logits that are closer than this may be in either order, `[B]`."""
        lengths = torch.linalg.vector_norm(self.hidden, dim=1)
        return (lengths * self.rounding).to(self.weights.dtype)

    def queries(self) -> Sequence[Tensor]:
        """Hidden states in the space of each strip, `[B, r]`."""
        return [strip.query(self.hidden) for strip in self.strips]

    def items(self, positions: Tensor) -> Tensor:
        """Item ids of positions in popularity order."""
        return self.weights.partition.item_at[positions].long()

    def offset(self, j: int, rows: Tensor, log_sum: Tensor) -> Tensor:
        """Keep and return a block's offset, given the log of its summed exponentials, `[B]`.

        It is called again as more is known of the sum: by bounds, then by all rows, at last in
        float64. Each call adds to the doubt, as each may have been what an item was judged by.
        """
        if j == 0:
            branches = torch.cat([log_sum.double().unsqueeze(1), self.branches[rows]], dim=1)
            offset = -torch.logsumexp(branches, 1)
        else:
            offset = self.branches[rows, j - 1] + self.offsets[0, rows] - log_sum.double()
        self.offsets[j, rows] = offset
        rounded = offset.to(self.weights.dtype)
        self.blur[rows] += 8 * torch.finfo(rounded.dtype).eps * rounded.abs()
        return rounded

    def doubt(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Scores that are closer than this may be in either order, `[B]`; in a tree normalisers are
        off by as much as logits."""
        return 2 * self.slack[rows] + self.blur[rows] if self.is_tree else self.slack[rows]

    def settle(self, result: TopK, rows: Tensor, positions: Tensor, real: Tensor) -> None:
        """Put some rows of a result in order by float64 scores.

        Args:
            result: it is changed in place.
            rows: which.
            positions: among which the best of each row are, `[B, m]`.
            real: which of those count, `[B, m]`.
        """
        if len(rows):
            unsure = self._order(result, rows, positions, real)
            if self.is_tree and unsure.any():
                rows, positions, real = rows[unsure], positions[unsure], real[unsure]
                self._refine_offsets(rows, positions)
                self._order(result, rows, positions, real)

    def _order(self, result: TopK, rows: Tensor, positions: Tensor, real: Tensor) -> Tensor:
        """As `settle`; returns where errors of the offsets could change the order, `[B] bool`."""
        exact = self._exact_scores(rows, positions).masked_fill(~real, -torch.inf)
        items = self.items(positions)
        by_id = items.argsort(dim=1)
        exact, items = exact.gather(1, by_id), items.gather(1, by_id)
        best, at = exact.to(self.weights.dtype).sort(dim=1, descending=True, stable=True)
        result.items[rows] = items.gather(1, at[:, : self.k])
        result.scores[rows] = best[:, : self.k]
        if not self.is_tree:
            return torch.zeros_like(rows, dtype=torch.bool)
        # normalisers are sums in the model's precision: that may matter between two blocks, and
        # inside one to which number a score is rounded
        gap = -exact.sort(dim=1, descending=True).values.diff(dim=1)[:, : self.k]
        blocks = self.weights.partition.blocks(positions.gather(1, by_id).gather(1, at))
        across = (blocks.diff(dim=1) != 0)[:, : self.k]
        units = torch.finfo(best.dtype).eps * best[:, : gap.shape[1]].abs()
        unsure = (gap > 0) & (gap <= 4 * units) | across & (gap <= self.doubt(rows)[:, None])
        return unsure.any(1)

    def _refine_offsets(self, rows: Tensor, positions: Tensor) -> None:
        """Compute in float64 the offsets of a tree's blocks that hold some of the positions."""
        hidden = self.hidden[rows]
        for j, strip in enumerate(self.weights.whole):
            if j == 0 or strip.holds(positions).any():
                self.offset(j, rows, exact_log_sum(strip, hidden))

    def sort_exactly(self, result: TopK, rows: Tensor) -> None:
        """Replace some rows of a result by those of a sort of all float64 scores."""
        if len(rows):
            barred = self.barred.pick(rows, len(self.hidden))
            exact = sort_topk(self.weights, self.hidden[rows], self.k, barred, self.allowed)
            result.items[rows], result.scores[rows] = exact.items, exact.scores

    def _exact_scores(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Scores of some positions in float64, `[B], [B, m] -> [B, m]`."""
        vectors = self.weights.vectors
        if vectors is not None and positions.numel() * vectors.shape[1] <= PIECE:
            scores = (vectors[positions] * self.hidden[rows].unsqueeze(1)).sum(2)
            if self.is_tree:
                blocks = self.weights.partition.blocks(positions)
                scores += self.offsets.T[rows].gather(1, blocks)
            return scores
        widest = max(strip.basis.shape[1] for strip in self.weights.whole)
        size = max(1, PIECE // 2 // (widest * positions.shape[1]))
        parts = []
        for some, places in zip(rows.split(size), positions.split(size)):
            scores = self.hidden.new_full(places.shape, -torch.inf)
            for j, strip in enumerate(self.weights.whole):
                if not strip.n_items:
                    continue
                codes = strip.codes[(places - strip.start).clamp(0, strip.n_items - 1)]
                query = (self.hidden[some] @ strip.basis).unsqueeze(1)
                part = (codes.double() * query).sum(2)
                if self.is_tree:
                    part += self.offsets[j, some].unsqueeze(1)
                scores = torch.where(strip.holds(places), part, scores)
            parts.append(scores)
        return torch.cat(parts)


def sort_topk(
    weights: Weights, hidden: Tensor, k: int, barred: Barred, allowed: Tensor | None
) -> TopK:
    """The k best items of each row by a stable sort of all scores in float64.

    Args:
        weights: the head's.
        hidden: hidden states, float64, `[B, d]`.
        k: how many items.
        barred: what each row must not get.
        allowed: positions of the only items that rows may get; None for all.
    """
    parts = []
    size = max(1, PIECE // 4 // weights.n_items)
    for start in range(0, len(hidden), size):
        scores = _exact_scores_of_all(weights, hidden[start : start + size])
        if allowed is not None:
            others = torch.ones(weights.n_items, dtype=torch.bool, device=scores.device)
            scores[:, others.index_fill(0, allowed, False)] = -torch.inf
        some = barred.of_rows(start, start + len(scores))
        scores[some.rows, some.positions] = -torch.inf
        by_item = weights.partition.by_item(scores.to(weights.dtype))
        best, items = by_item.sort(dim=1, descending=True, stable=True)
        parts.append((items[:, :k], best[:, :k]))
    return TopK(*(torch.cat(part) for part in zip(*parts)))


def exact_log_sum(strip: Strip, hidden: Tensor) -> Tensor:
    """Log of the summed exponentials of a strip's logits in float64, `[B, d] -> [B]`."""
    query = hidden @ strip.basis
    pieces = strip.codes.split(max(1, PIECE // 2 // len(hidden)))
    sums = [torch.logsumexp(query @ codes.double().T, dim=1) for codes in pieces]
    return torch.logsumexp(torch.stack(sums, dim=1), dim=1)


def _exact_scores_of_all(weights: Weights, hidden: Tensor) -> Tensor:
    """Scores by position, in float64, `[B, d] -> [B, n_items]`; -inf for padding."""
    logits = [
        torch.cat([hidden @ strip.basis @ rows.double().T for rows in strip.codes.split(PIECE)], 1)
        for strip in weights.whole
    ]
    if weights.clusters is not None:
        branches = hidden @ weights.clusters.T
        total = torch.logsumexp(torch.cat([logits[0], branches], 1), 1, keepdim=True)
        inside = [
            part - part.logsumexp(1, keepdim=True) + branches[:, j, None] - total
            for j, part in enumerate(logits[1:])
        ]
        logits = [logits[0] - total, *inside]
    padding = hidden.new_full((len(hidden), 1), -torch.inf)
    return torch.cat([padding, *logits], dim=1)
