"""Lists of item ids into the padded batches that models read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.partition import PADDING
from cprec_recbole.search.topk import check_ids

_NOTHING = np.empty(0, dtype=np.int64)


def pad_histories(
    item_seq: Any, n_items: int, max_length: int, name: str = "item_seq"
) -> tuple[Tensor, Tensor, Tensor]:
    """Check one history of item ids, oldest first, or several, and bring them into RecBole's form:
    the newest items, padded on the right, `[B, max_length]`; how many they are, `[B]`; and all
    items, `[B, longest]`. Zeros are padding; errors call the histories by `name`."""
    rows, _ = _rows(item_seq, n_items, name)
    if not rows:
        raise CompressionError(f"Expected `{name}` to hold at least one history, but got none.")
    lengths = list(map(len, rows))
    if 0 in lengths:
        raise CompressionError(
            f"Expected every history of `{name}` to hold an item, but history {lengths.index(0)} "
            "has none."
        )
    newest = _padded([row[-max_length:] for row in rows], max_length)
    seen = newest if max(lengths) <= max_length else _padded(rows)
    ends = np.array([min(length, max_length) for length in lengths])
    return newest, torch.from_numpy(ends), seen


def barred_ids(exclude: Any, n_rows: int, n_items: int, seen: Tensor | None) -> Tensor | None:
    """Item ids to leave out of each row, `[B, m]` padded with 0; None where there are none: those
    to `exclude`, one list for all rows or one for each, and those that each has `seen`, `[B, l]`.
    """
    if exclude is None:
        return seen
    rows, are_several = _rows(exclude, n_items, "exclude")
    if are_several and len(rows) != n_rows:
        raise CompressionError(
            f"Expected `exclude` to be one list of item ids or {n_rows}, one for each history, but "
            f"got {len(rows)}."
        )
    ids = _padded(rows).expand(n_rows, -1)
    return ids if seen is None else torch.cat([ids, seen], dim=1)


def _padded(rows: list[np.ndarray], width: int = 0) -> Tensor:
    """Lists of ids as one tensor, with zeros behind, `[B, longest]` or wider."""
    padded = np.zeros((len(rows), width or max(map(len, rows))), np.int64)
    for place, row in zip(padded, rows):
        place[: len(row)] = row
    return torch.from_numpy(padded)


def _rows(ids: Any, n_items: int, name: str) -> tuple[list[np.ndarray], bool]:
    """One list of item ids or several, checked and without padding, `[length]` each; and whether
    there may be several."""
    is_table = getattr(ids, "ndim", 1) == 2
    are_several = is_table or (
        isinstance(ids, Sequence)
        and not isinstance(ids, str)
        and not _are_plain(ids)
        and any(isinstance(entry, Sequence) or getattr(entry, "ndim", 0) for entry in ids)
    )
    if is_table:
        rows = list(_ids(ids, n_items, name))
    else:
        rows = [_ids(row, n_items, name) for row in (ids if are_several else [ids])]
    if any(row.ndim != 1 for row in rows):
        raise CompressionError(f"Expected `{name}` to be item ids or lists of them, but got {ids}.")
    return [row if row.all() else row[row != PADDING] for row in rows], are_several


def _ids(row: Any, n_items: int, name: str) -> np.ndarray:
    """See check_ids, which takes longer."""
    if isinstance(row, list) and _are_plain(row):
        ids = np.array(row)
    elif isinstance(row, Tensor) and row.dtype == torch.int64 and row.device.type == "cpu":
        ids = row.numpy()
    else:
        ids = _NOTHING
    # a number below 0 is a large one without a sign
    if ids.dtype == np.int64 and ids.size and ids.view(np.uint64).max() < n_items:
        return ids
    return check_ids(row, n_items, name).cpu().numpy()


def _are_plain(row: Sequence[Any]) -> bool:
    """Whether a list holds whole numbers of Python and nothing else."""
    return set(map(type, row)) == {int}
