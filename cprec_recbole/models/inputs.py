"""Lists of item ids into the padded batches that models read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cprec_recbole.config import CompressionError
from cprec_recbole.partition import PADDING


def pad_histories(
    item_seq: Any, n_items: int, max_length: int, name: str = "item_seq"
) -> tuple[Tensor, Tensor]:
    """Check histories and bring them into RecBole's form: the newest items, padded on the right.

    Args:
        item_seq: one history of item ids, oldest first, or several; zeros are padding.
        n_items: items of the catalogue, padding included.
        max_length: positions of the model.
        name: what errors call the histories.

    Returns:
        The histories `[B, max_length]`, and all items of each history `[B, longest]`.

    Raises:
        CompressionError: an empty history, ids that are no whole numbers or outside the catalogue.
    """
    rows, _ = _rows(item_seq, n_items, name)
    if not rows:
        raise CompressionError(f"Expected `{name}` to hold at least one history, but got none.")
    for index, row in enumerate(rows):
        if not len(row):
            raise CompressionError(
                f"Expected every history of `{name}` to hold an item, but history {index} is empty."
            )
    whole = pad_sequence(rows, batch_first=True)
    newest = pad_sequence([row[-max_length:] for row in rows], batch_first=True)
    return torch.nn.functional.pad(newest, (0, max_length - newest.shape[1])), whole


def barred_ids(exclude: Any, n_rows: int, n_items: int, seen: Tensor | None) -> Tensor | None:
    """Item ids to leave out of each row, `[B, m]` padded with 0; None where there are none: those
    to `exclude`, one list for all rows or one for each, and those that each has `seen`, `[B, l]`.
    A CompressionError for what is no such list."""
    if exclude is None:
        return seen
    rows, is_nested = _rows(exclude, n_items, "exclude")
    if is_nested and len(rows) != n_rows:
        raise CompressionError(
            f"Expected `exclude` to be one list of item ids or {n_rows}, one for each history, but "
            f"got {len(rows)}."
        )
    ids = pad_sequence(rows, batch_first=True).expand(n_rows, -1)
    return ids if seen is None else torch.cat([ids, seen], dim=1)


def _rows(ids: Any, n_items: int, name: str) -> tuple[list[Tensor], bool]:
    """One list of item ids or several, checked and without padding, `[length]` each; and whether
    there may be several."""
    if isinstance(ids, Tensor | np.ndarray):
        if ids.ndim not in (1, 2):
            raise CompressionError(
                f"Expected `{name}` to have 1 or 2 dimensions ([L] or [B, L]), but got {ids.ndim}."
            )
        is_nested = ids.ndim == 2
    elif isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise CompressionError(
            f"Expected `{name}` to be item ids or lists of them, but got {ids!r}."
        )
    else:
        is_nested = any(isinstance(entry, Sequence) or getattr(entry, "ndim", 0) for entry in ids)
    rows = [check_ids(row, n_items, name).cpu() for row in (ids if is_nested else [ids])]
    return [row[row != PADDING] for row in rows], is_nested


def check_ids(ids: Any, n_items: int, name: str, dims: Sequence[int] = (1,)) -> Tensor:
    """Item ids, 0 among them, as int64 of the same shape; a CompressionError that calls them by
    `name` where they are no whole numbers, outside the catalogue or of other dimensions."""
    try:  # PyTorch does not read arrays of every byte order and direction
        tensor = torch.as_tensor(ids.tolist() if isinstance(ids, np.ndarray) else ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CompressionError(
            f"Expected `{name}` to hold whole numbers, but got {ids!r}."
        ) from error
    is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.ndim not in dims or (tensor.numel() and not is_whole):
        raise CompressionError(f"Expected `{name}` to hold item ids, but got {ids!r}.")
    tensor = tensor.long()
    outside = tensor[(tensor < 0) | (tensor >= n_items)]
    if len(outside):
        raise CompressionError(
            f"Expected `{name}` to hold item ids from 1 to {n_items - 1} (0 is padding), but got "
            f"{int(outside[0])}."
        )
    return tensor
