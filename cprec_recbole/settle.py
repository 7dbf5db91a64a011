"""Scores in float64: what decides where two places are closer than rounding errors.

Rounded to the model's precision and sorted with equal scores by lower item id, they are the
definition of the result; the search is a fast way to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cprec_recbole.partition import Partition
from cprec_recbole.strips import PlainStrip, Strip
from cprec_recbole.topk import Barred, TopK

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

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the first pass, and of scores."""
        return self.whole[0].codes.dtype

    @property
    def n_items(self) -> int:
        """Items of the catalogue, padding included."""
        return self.partition.n_items


def dense_topk(
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
    size = max(1, PIECE // 4 // weights.n_items)
    parts = []
    for start in range(0, len(hidden), size):
        scores = _dense_scores(weights, hidden[start : start + size])
        if allowed is not None:
            others = torch.ones(weights.n_items, dtype=torch.bool, device=scores.device)
            scores[:, others.index_fill(0, allowed, False)] = -torch.inf
        some = barred.of_rows(start, start + len(scores))
        scores[some.rows, some.positions] = -torch.inf
        by_item = scores.to(weights.dtype)[:, weights.partition.position_of]
        best, items = by_item.sort(dim=1, descending=True, stable=True)
        parts.append((items[:, :k], best[:, :k]))
    return TopK(*(torch.cat(part) for part in zip(*parts)))


def exact_scores(weights: Weights, hidden: Tensor, offsets: Tensor, positions: Tensor) -> Tensor:
    """Scores of some positions, in float64, `[B, d], [n_blocks, B], [B, m] -> [B, m]`.

    Args:
        weights: the head's.
        hidden: hidden states, float64.
        offsets: score less logit in each block.
        positions: in popularity order.
    """
    rank = max(strip.basis.shape[1] for strip in weights.whole)
    size = max(1, PIECE // 2 // (rank * positions.shape[1]))
    parts = []
    for rows in torch.arange(len(hidden), device=hidden.device).split(size):
        scores = hidden.new_full((len(rows), positions.shape[1]), -torch.inf)
        for j, strip in enumerate(weights.whole):
            inside = strip.holds(positions[rows])
            at = (positions[rows] - strip.start).clamp(0, max(0, strip.n_items - 1))
            if not strip.n_items:
                continue
            query = (hidden[rows] @ strip.basis).unsqueeze(1)
            logits = (strip.codes[at].double() * query).sum(2)
            scores = torch.where(inside, logits + offsets[j, rows].unsqueeze(1), scores)
        parts.append(scores)
    return torch.cat(parts)


def _dense_scores(weights: Weights, hidden: Tensor) -> Tensor:
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
