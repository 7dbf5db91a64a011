"""What a top-k search returns, and which items it must not return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.partition import PADDING, Partition

Ids = Tensor | np.ndarray | Sequence


class TopK(NamedTuple):
    """The best items of each row, best first; equal scores by lower item id.

    Attributes:
        items: item ids, `[B, k]`.
        scores: their scores, `[B, k]`.
    """

    items: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Excluded:
    """Items that rows must not get, as pairs sorted by row, then position; no pair twice.

    Attributes:
        rows: row of the batch, `[M]`.
        positions: position of the item in popularity order, `[M]`.
    """

    rows: Tensor
    positions: Tensor

    @classmethod
    def nothing(cls, device: torch.device) -> Excluded:
        """Every item may be returned."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return cls(none, none)

    @classmethod
    def from_ids(cls, exclude: Ids | None, n_rows: int, partition: Partition) -> Excluded:
        """Check ids to exclude, `[B, m]` or `[m]` for all rows; 0 excludes nothing.

        Raises:
            CompressionError: another shape, ids that are no whole numbers or outside the catalogue.
        """
        if exclude is None:
            return cls.nothing(partition.position_of.device)
        ids = _as_ids("exclude", exclude, partition.n_items)
        if ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != n_rows):
            raise CompressionError(
                f"Expected `exclude` to be item ids of shape [{n_rows}, m] or [m], but got "
                f"{list(ids.shape)}."
            )
        ids = ids.to(partition.position_of.device).expand(n_rows, -1)
        rows = torch.arange(n_rows, device=ids.device).unsqueeze(1).expand_as(ids)
        keys = (rows * partition.n_items + partition.positions(ids)).flatten().unique()
        keys = keys[keys % partition.n_items != PADDING]
        return cls(keys // partition.n_items, keys % partition.n_items)

    def least_left(self, n_rows: int, n_items: int, allowed: Tensor | None) -> int:
        """The fewest items that any row has left."""
        rows, left = self.rows, n_items - 1
        if allowed is not None:
            rows, left = rows[torch.isin(self.positions, allowed)], len(allowed)
        if not len(rows):
            return left
        return left - int(torch.bincount(rows, minlength=n_rows).max())

    def of_rows(self, start: int, end: int) -> Excluded:
        """Those of rows `start` to `end`, numbered from 0."""
        if not len(self.rows):
            return self
        bounds = torch.tensor([start, end], device=self.rows.device)
        first, last = torch.searchsorted(self.rows, bounds).tolist()
        return Excluded(self.rows[first:last] - start, self.positions[first:last])

    def hit(self, rows: Tensor, positions: Tensor, n_items: int) -> Tensor:
        """Which of some (row, position) pairs are excluded, `[C], [C] -> [C]`."""
        if not len(self.rows):
            return torch.zeros_like(rows, dtype=torch.bool)
        keys, wanted = self.rows * n_items + self.positions, rows * n_items + positions
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return keys[at] == wanted


def allowed_positions(allowed: Ids, partition: Partition) -> Tensor:
    """Positions of the ids that may be recommended, sorted, each once, `[m] -> [<= m]`.

    Raises:
        CompressionError: no id but 0, another shape, or ids outside the catalogue.
    """
    ids = _as_ids("allowed", allowed, partition.n_items)
    if ids.ndim != 1:
        raise CompressionError(
            f"Expected `allowed` to be item ids of shape [m], but got {list(ids.shape)}."
        )
    ids = ids.to(partition.position_of.device)
    positions = partition.positions(ids[ids != PADDING]).unique()
    if not len(positions):
        raise CompressionError(
            "Expected `allowed` to hold at least one item, but it is empty; leave it out to allow "
            "every item."
        )
    return positions


def check_k(k: object, left: int) -> int:
    """A number of results that can be given.

    Raises:
        CompressionError: no whole number, or not from 1 to the items that are left.
    """
    whole = isinstance(k, Integral) and not isinstance(k, bool)
    if not whole or not 1 <= k <= left:  # type: ignore[operator]
        raise CompressionError(
            f"Expected `k` to be from 1 to the {left} items that may be recommended, but got {k!r}."
        )
    return int(k)  # type: ignore[call-overload]


def _as_ids(name: str, ids: Ids, n_items: int) -> Tensor:
    """Item ids as int64, whatever whole numbers they come as."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        ids = ids.astype(np.int64)  # of any width, byte order and direction
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CompressionError(
            f"Expected `{name}` to hold item ids, whole numbers, but got {type(ids).__name__}: "
            f"{error}"
        ) from error
    if not tensor.numel():
        return tensor.to(torch.int64)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise CompressionError(
            f"Expected `{name}` to hold item ids, whole numbers, but got {tensor.dtype}."
        )
    tensor = tensor.to(torch.int64)
    low, high = (int(bound) for bound in tensor.aminmax())
    if low < 0 or high >= n_items:
        raise CompressionError(
            f"Expected `{name}` to hold item ids from 0 to {n_items - 1}, but got "
            f"{low if low < 0 else high}."
        )
    return tensor


def not_finite() -> CompressionError:
    """The error for hidden states that are no numbers."""
    return CompressionError(
        "Expected `hidden` to hold finite numbers, but found NaN or infinity; the model "
        "diverged in training, or its input is damaged."
    )
