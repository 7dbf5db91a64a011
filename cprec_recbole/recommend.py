"""Raw histories into the padded batches that models read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.partition import PADDING

History = Sequence[int]


def pad_histories(
    item_seq: Tensor | History | Sequence[History], n_items: int, max_length: int
) -> tuple[Tensor, Tensor]:
    """Check histories and bring them into RecBole's form: the newest items, padded on the right.

    Args:
        item_seq: one history of item ids, oldest first, or several; zeros are padding.
        n_items: items of the catalogue, padding included.
        max_length: positions of the model.

    Returns:
        The histories `[B, max_length]`, and all items of each history `[B, longest]`.

    Raises:
        CompressionError: an empty history, ids that are no whole numbers or outside the catalogue.
    """
    rows = [_checked(row, n_items) for row in _as_rows(item_seq)]
    if not rows:
        raise CompressionError("Expected `item_seq` to hold at least one history, but got none.")
    for index, row in enumerate(rows):
        if not len(row):
            raise CompressionError(
                "Expected every history of `item_seq` to hold an item, but history "
                f"{index} is empty."
            )
    padded = torch.full((len(rows), max_length), PADDING)
    for target, row in zip(padded, rows):
        newest = row[-max_length:]
        target[: len(newest)] = newest
    return padded, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def barred_ids(
    exclude: Tensor | History | Sequence[History] | None, n_rows: int, seen: Tensor | None
) -> Tensor | None:
    """Item ids to leave out of each row, `[B, m]` padded with 0; None where there are none.

    Args:
        exclude: one list of ids for all rows, or one for each.
        n_rows: rows of the batch.
        seen: more ids for each row, `[B, l]`.

    Raises:
        CompressionError: lists for another number of rows, or what are no whole numbers.
    """
    if exclude is None:
        return seen
    if not isinstance(exclude, Tensor):
        rows = [torch.as_tensor(row) for row in _as_rows(exclude, "exclude")]
        rows = [row if row.numel() else row.to(torch.int64) for row in rows]
        if len(rows) == 1 and rows[0].ndim == 1:
            exclude = rows[0]
        else:
            exclude = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if exclude.ndim == 1:
        exclude = exclude.expand(n_rows, -1)
    if exclude.ndim != 2 or len(exclude) != n_rows:
        raise CompressionError(
            f"Expected `exclude` to be one list of item ids or {n_rows}, one for each history, but "
            f"got a shape of {list(exclude.shape)}."
        )
    return exclude if seen is None else torch.cat([exclude, seen.to(exclude.device)], dim=1)


def _as_rows(
    item_seq: Tensor | History | Sequence[History], name: str = "item_seq"
) -> list[object]:
    if isinstance(item_seq, Tensor | np.ndarray):
        if item_seq.ndim not in (1, 2):
            raise CompressionError(
                f"Expected `{name}` to have 1 or 2 dimensions ([L] or [B, L]), but got "
                f"{item_seq.ndim}."
            )
        return [item_seq] if item_seq.ndim == 1 else list(item_seq)
    if isinstance(item_seq, str | bytes) or not isinstance(item_seq, Sequence):
        raise CompressionError(
            f"Expected `{name}` to be item ids or lists of them, but got {item_seq!r}."
        )
    several = any(isinstance(entry, Sequence | Tensor | np.ndarray) for entry in item_seq)
    nested = several and all(getattr(entry, "ndim", 1) == 1 for entry in item_seq)
    return list(item_seq) if nested else [item_seq]


def _checked(history: object, n_items: int) -> Tensor:
    """One history as ids without padding, `[length]`."""
    if isinstance(history, np.ndarray):  # of any byte order, reversed or not
        history = history.tolist()
    try:
        ids = torch.as_tensor(history)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CompressionError(
            f"Expected `item_seq` to hold whole numbers, but got {history!r}."
        ) from error
    fractional = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if ids.ndim != 1 or (len(ids) and fractional):
        raise CompressionError(f"Expected `item_seq` to hold item ids, but got {history!r}.")
    ids = ids.cpu().long()
    outside = ids[(ids < 0) | (ids >= n_items)]
    if len(outside):
        raise CompressionError(
            f"Expected `item_seq` to hold item ids from 1 to {n_items - 1} (0 is padding), but got "
            f"{int(outside[0])}."
        )
    return ids[ids != PADDING]
