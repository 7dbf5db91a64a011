"""Slow and plain references."""

from __future__ import annotations

import copy
import math
from unittest import mock

import torch
from recbole.data.dataset import SequentialDataset

from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.host import data
from cprec_recbole.softmax import Softmax, TreeSoftmax


class StockDataset(SequentialDataset):
    """RecBole's own data set, without what this package puts in the place of its methods."""

    def _load_feat(self, *arguments):
        with mock.patch.object(data, "is_simple", return_value=False):
            return super()._load_feat(*arguments)

    sort = SequentialDataset.sort._cprec_original
    data_augmentation = SequentialDataset.data_augmentation._cprec_original
    build = SequentialDataset.build._cprec_original


def item_vector(table: BlockEmbedding, item: int) -> torch.Tensor:
    """The vector of one item by the definition, `W_j[g] P_j`."""
    position = table.partition.item_at.tolist().index(item)
    for block, start, end in zip(table.blocks, table.partition.starts, table.partition.cutoffs):
        if start <= position < end:
            row = block.weight[position - start]
            return row if block.projection is None else row @ block.projection
    raise AssertionError("every position lies in a block")


def block_of(table: BlockEmbedding, item: int) -> int:
    position = table.partition.item_at.tolist().index(item)
    return sum(position >= cutoff for cutoff in table.partition.cutoffs)


def log_prob_row(head: Softmax, hidden: torch.Tensor) -> list[float]:
    """Log-probability of every item for one hidden state, item by item."""
    n_items = head.table.partition.n_items
    logit = {i: float(hidden @ item_vector(head.table, i)) for i in range(1, n_items)}
    if not isinstance(head, TreeSoftmax):
        total = _log_sum_exp(list(logit.values()))
        return [-math.inf] + [logit[i] - total for i in range(1, n_items)]
    members = {j: [] for j in range(len(head.table.blocks))}
    for i in range(1, n_items):
        members[block_of(head.table, i)].append(i)
    clusters = [float(hidden @ cluster) for cluster in head.clusters]
    top = _log_sum_exp([logit[i] for i in members[0]] + clusters)
    result = [-math.inf] * n_items
    for j, items in members.items():
        inside = top if j == 0 else _log_sum_exp([logit[i] for i in items])
        cluster = 0.0 if j == 0 else clusters[j - 1] - top
        for i in items:
            result[i] = cluster + logit[i] - inside
    return result


def best_items(scores: list[float], k: int, excluded: set[int] = frozenset()) -> list[int]:
    """The k best real items, equal scores by lower id."""
    allowed = [i for i in range(1, len(scores)) if i not in excluded]
    return sorted(allowed, key=lambda i: (-scores[i], i))[:k]


def windows(history: list[int], length: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and next items of a training sequence, cut from the newest target back."""
    result = []
    end = len(history)
    while end > 1:
        start = max(1, end - length)
        result.append((history[start - 1 : end - 1], history[start:end]))
        end = start
    return result


def _log_sum_exp(values: list[float]) -> float:
    return float(torch.logsumexp(torch.tensor(values, dtype=torch.float64), 0))


def best_by_sort(
    head: Softmax,
    hidden: torch.Tensor,
    k: int,
    exclude: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Items and scores of a dense stable sort in float64, rounded to the head's precision."""
    exact = copy.deepcopy(head).double()
    weights = head.table.blocks[0].weight
    kind = weights.dtype if weights.dtype == torch.float64 else torch.float32
    scores = exact.scores(hidden.double()).to(kind)
    scores[:, 0] = -math.inf
    if exclude is not None:
        scores.scatter_(1, exclude.expand(len(hidden), -1), -math.inf)
    if allowed is not None:
        others = torch.ones(scores.shape[1], dtype=torch.bool)
        others[allowed] = False
        scores[:, others] = -math.inf
    best, items = scores.sort(dim=1, descending=True, stable=True)
    return items[:, :k], best[:, :k]
