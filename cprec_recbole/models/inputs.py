"""Lists of item ids into the padded batches that models read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cprec_recbole.config import CompressionError
from cprec_recbole.partition import PADDING
from cprec_recbole.search.topk import check_ids


def pad_histories(
    item_seq: Any, n_items: int, max_length: int, name: str = "item_seq"
) -> tuple[Tensor, Tensor]:
    """Check one history of item ids, oldest first, or several, and bring them into RecBole's form:
    the newest items, padded on the right, `[B, max_length]`; and all of them, `[B, longest]`. Zeros
    are padding; errors call the histories by `name`."""
    rows, _ = _rows(item_seq, n_items, name)
    if not rows:
        raise CompressionError(f"Expected `{name}` to hold at least one history, but got none.")
    for index, row in enumerate(rows):
        if not len(row):
            raise CompressionError(
                f"Expected every history of `{name}` to hold an item, but history {index} has none."
            )
    newest = pad_sequence([row[-max_length:] for row in rows], batch_first=True)
    newest = F.pad(newest, (0, max_length - newest.shape[1]))
    return newest, pad_sequence(rows, batch_first=True)


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
    ids = pad_sequence(rows, batch_first=True).expand(n_rows, -1)
    return ids if seen is None else torch.cat([ids, seen], dim=1)


def _rows(ids: Any, n_items: int, name: str) -> tuple[list[Tensor], bool]:
    """One list of item ids or several, checked and without padding, `[length]` each; and whether
    there may be several."""
    are_several = getattr(ids, "ndim", 1) == 2 or (
        isinstance(ids, Sequence)
        and not isinstance(ids, str)
        and any(isinstance(entry, Sequence) or getattr(entry, "ndim", 0) for entry in ids)
    )
    rows = [check_ids(row, n_items, name).cpu() for row in (ids if are_several else [ids])]
    if any(row.ndim != 1 for row in rows):
        raise CompressionError(f"Expected `{name}` to be item ids or lists of them, but got {ids}.")
    return [row[row != PADDING] for row in rows], are_several
