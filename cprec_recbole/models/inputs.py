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
    item_seq: Tensor | History | Sequence[History],
    n_items: int,
    max_length: int,
    name: str = "item_seq",
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
    rows = [_checked(row, n_items, name) for row in _as_rows(item_seq, name)]
    if not rows:
        raise CompressionError(f"Expected `{name}` to hold at least one history, but got none.")
    for index, row in enumerate(rows):
        if not len(row):
            raise CompressionError(
                f"Expected every history of `{name}` to hold an item, but history {index} is empty."
            )
    padded = torch.full((len(rows), max_length), PADDING)
    for target, row in zip(padded, rows):
        newest = row[-max_length:]
        target[: len(newest)] = newest
    return padded, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def barred_ids(
    exclude: Tensor | History | Sequence[History] | None,
    n_rows: int,
    n_items: int,
    seen: Tensor | None,
) -> Tensor | None:
    """Item ids to leave out of each row, `[B, m]` padded with 0; None where there are none.

    Args:
        exclude: one list of ids for all rows, or one for each.
        n_rows: rows of the batch.
        n_items: items of the catalogue, padding included.
        seen: more ids for each row, `[B, l]`.

    Raises:
        CompressionError: lists for another number of rows, ids that are no whole numbers or outside
            the catalogue.
    """
    if exclude is None:
        return seen
    rows = [_checked(row, n_items, "exclude") for row in _as_rows(exclude, "exclude")]
    one_list = len(rows) == 1 and not _is_nested(exclude)
    if not one_list and len(rows) != n_rows:
        raise CompressionError(
            f"Expected `exclude` to be one list of item ids or {n_rows}, one for each history, but "
            f"got {len(rows)}."
        )
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).expand(n_rows, -1)
    return ids if seen is None else torch.cat([ids, seen], dim=1)


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
    return list(item_seq) if _is_nested(item_seq) else [item_seq]


def _is_nested(item_seq: Tensor | History | Sequence[History]) -> bool:
    """Whether these are several lists, or one of ids."""
    if isinstance(item_seq, Tensor | np.ndarray):
        return item_seq.ndim == 2
    several = any(isinstance(entry, Sequence | Tensor | np.ndarray) for entry in item_seq)
    return several and all(getattr(entry, "ndim", 1) == 1 for entry in item_seq)


def _checked(history: object, n_items: int, name: str = "item_seq") -> Tensor:
    """One history as ids without padding, `[length]`."""
    if isinstance(history, np.ndarray):  # of any byte order, reversed or not
        history = history.tolist()
    try:
        ids = torch.as_tensor(history)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CompressionError(
            f"Expected `{name}` to hold whole numbers, but got {history!r}."
        ) from error
    fractional = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if ids.ndim != 1 or (len(ids) and fractional):
        raise CompressionError(f"Expected `{name}` to hold item ids, but got {history!r}.")
    ids = ids.cpu().long()
    outside = ids[(ids < 0) | (ids >= n_items)]
    if len(outside):
        raise CompressionError(
            f"Expected `{name}` to hold item ids from 1 to {n_items - 1} (0 is padding), but got "
            f"{int(outside[0])}."
        )
    return ids[ids != PADDING]
