"""Exact top-k over a catalogue."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.partition import PADDING


class TopK(NamedTuple):
    """The best items of each row, best first; equal scores by lower item id.

    Attributes:
        items: item ids, `[B, k]`.
        scores: their scores, `[B, k]`.
    """

    items: Tensor
    scores: Tensor


def dense_topk(scores: Tensor, k: int, exclude: Tensor | None = None) -> TopK:
    """The k best real items of each row of a dense score matrix.

    Args:
        scores: score of every item in id order, `[B, n_items]`.
        k: how many to return.
        exclude: item ids that must not be returned, `[B, m]`; 0 excludes nothing.

    Raises:
        CompressionError: fewer than k items are left in some row.
    """
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if exclude is not None:
        allowed.scatter_(1, exclude, False)
    allowed[:, PADDING] = False
    left = int(allowed.sum(1).min()) if len(scores) else k
    if not 1 <= k <= left:
        raise CompressionError(
            f"Expected `k` to be from 1 to the {left} items that may be recommended, but got {k}."
        )
    masked = scores.masked_fill(~allowed, -torch.inf)
    ranked, order = masked.sort(dim=1, descending=True, stable=True)
    return TopK(order[:, :k], ranked[:, :k])
