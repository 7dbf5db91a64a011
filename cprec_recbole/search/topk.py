"""What a top-k search returns, and the checks of what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError, is_whole
from cprec_recbole.partition import PADDING, Partition

_NOTHING = torch.empty(0, dtype=torch.int64)
Ids = Tensor | np.ndarray | Sequence


class TopK(NamedTuple):
    """Item ids and scores of the best of each row, `[B, k]`, best first; equal scores by lower item
    id."""

    items: Tensor
    scores: Tensor


class Found(NamedTuple):
    """A search's result, and the share of the tail's rows that were read, a row of the batch."""

    topk: TopK
    tail_share: float


class Limits(NamedTuple):
    """What a search may return, in positions of popularity order."""

    k: int  # items of each row
    n_rows: int  # rows of the batch
    n_items: int  # items of the catalogue
    excluded: Tensor  # `row * n_items + position` of what a row must not get, each once, `[M]`
    allowed: Tensor | None  # the only positions that rows may get, rising, `[m]`; None for all

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The excluded rows and positions, `[M], [M]`."""
        return self.excluded // self.n_items, self.excluded % self.n_items

    def of_rows(self, rows: Tensor) -> Limits:
        """Those of some rows, numbered as they come, `[B]`."""
        if not len(self.excluded):
            return self._replace(n_rows=len(rows))
        number = torch.full((self.n_rows,), -1, device=rows.device)
        number[rows] = torch.arange(len(rows), device=rows.device)
        owners, positions = self.pairs()
        keys = (number[owners] * self.n_items + positions)[number[owners] >= 0]
        return self._replace(n_rows=len(rows), excluded=keys)


def not_finite(hidden: Tensor) -> CompressionError:
    """What is said where scores are no finite numbers."""
    return CompressionError(
        "Expected scores to be finite numbers, but they overflow; the hidden states or the weights "
        "of the item table are far too large."
        if hidden.isfinite().all()
        else "Expected `hidden` to hold finite numbers, but found NaN or infinity; the model "
        "diverged in training, or its input is damaged."
    )


def check_limits(
    n_rows: int, k: object, exclude: Ids | None, allowed: Ids | None, partition: Partition
) -> Limits:
    """Check what `topk` is asked for a batch of `n_rows`; see there."""
    n_items = partition.n_items
    if exclude is None and allowed is None:
        return Limits(check_k(k, n_items - 1), n_rows, n_items, _NOTHING, None)
    device = partition.position_of.device
    excluded, places = _NOTHING, None
    if exclude is not None:
        ids = check_ids(exclude, n_items, "exclude")
        if ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != n_rows):
            raise CompressionError(
                f"Expected `exclude` to be item ids of shape [{n_rows}, m] or [m], but got "
                f"{list(ids.shape)}."
            )
        positions = partition.positions(ids.to(device)).expand(n_rows, -1)
        rows = torch.arange(n_rows, device=device).unsqueeze(1)
        excluded = (rows * n_items + positions)[positions != PADDING].unique()
    if allowed is not None:
        ids = check_ids(allowed, n_items, "allowed")
        if ids.ndim != 1:
            raise CompressionError(
                f"Expected `allowed` to be item ids of shape [m], but got {list(ids.shape)}."
            )
        places = partition.positions(ids[ids != PADDING].to(device)).unique()
        if not len(places):
            raise CompressionError(
                "Expected `allowed` to hold at least one item, but it is empty; leave it out to "
                "allow every item."
            )
    left = n_items - 1 if places is None else len(places)
    if len(excluded):
        counted = excluded if places is None else excluded[torch.isin(excluded % n_items, places)]
        left -= int(torch.bincount(counted // n_items, minlength=1).max())
    return Limits(check_k(k, left), n_rows, n_items, excluded, places)


def check_k(k: object, left: int) -> int:
    """The option `k`, which must be a whole number from 1 to the items that are left."""
    if not is_whole(k) or not 1 <= k <= left:
        raise CompressionError(
            f"Expected `k` to be from 1 to the {left} items that may be recommended, but got {k!r}."
        )
    return int(k)


def check_ids(ids: Any, n_items: int, name: str) -> Tensor:
    """Item ids, 0 among them, as int64 of the same shape; the error names the option."""
    if isinstance(ids, np.ndarray):  # PyTorch does not read every byte order and direction
        ids = ids.astype(np.int64) if ids.dtype.kind in "iu" else ids.tolist()
    try:
        tensor = torch.as_tensor(ids)
        kind = tensor.dtype if tensor.numel() else torch.int64  # an empty list is of no kind
        fits = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fits = False
    if not fits:
        got = ids.dtype if isinstance(ids, Tensor) else repr(ids)
        raise CompressionError(
            f"Expected `{name}` to hold item ids, which are whole numbers, but got {got}."
        )
    tensor = tensor.to(torch.int64)
    outside = tensor[(tensor < 0) | (tensor >= n_items)]
    if len(outside):
        raise CompressionError(
            f"Expected `{name}` to hold item ids from 1 to {n_items - 1} (0 is padding), but got "
            f"{int(outside[0])}."
        )
    return tensor
