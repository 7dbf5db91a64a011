"""Histories to fit on: windows of what users did, each training target at one position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.data.sequences import Pointers, SequenceRows
from cprec_recbole.data.windows import Windows
from cprec_recbole.partition import PADDING
from cprec_recbole.serving.inputs import pad_histories

_ROWS = 2**14  # of a data set that are gathered together


@dataclass(frozen=True)
class Histories:
    """Windows of item ids, padded with 0 on the right.

    Attributes:
        items: what was read, `[N, L]`.
        targets: the next item at each position, `[N, L]`; None where it is not known.
    """

    items: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, n: int, generator: torch.Generator) -> Histories:
        """At most n windows, drawn without replacement."""
        return self if len(self) <= n else self[torch.randperm(len(self), generator=generator)[:n]]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[Histories]:
        """Windows in batches: in their order, or shuffled where a generator is given."""
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            yield self[rows]

    def __getitem__(self, rows: Tensor) -> Histories:
        return Histories(self.items[rows], None if self.targets is None else self.targets[rows])

    def required_targets(self) -> Tensor:
        """The targets, `[N, L]`; a CompressionError where there are none."""
        if self.targets is None:
            raise CompressionError("Expected histories with targets, but these have none.")
        return self.targets

    def prefixes(self) -> tuple[Tensor, Tensor]:
        """Each target with the items before it in its window, `[M, L], [M]`; for models that read
        one position only."""
        targets = self.required_targets()
        row, column = (targets != PADDING).nonzero(as_tuple=True)
        later = torch.arange(self.items.shape[1]) > column.unsqueeze(1)
        return self.items[row].masked_fill(later, PADDING), targets[row, column]


def histories_of(data: Any, n_items: int, max_length: int, name: str = "data") -> Histories:
    """Windows out of RecBole's training data or of lists of item ids.

    Args:
        data: a RecBole training dataset or data loader, of a Cp model or of RecBole's own (whose
            row for every prefix is brought back into windows); or histories of item ids, oldest
            first.
        n_items: items of the catalogue, padding included.
        max_length: positions of the model.
        name: what messages call the data.

    Raises:
        CompressionError: neither of them, empty, or of another catalogue.
    """
    if isinstance(data, FullSortEvalDataLoader | NegSampleEvalDataLoader):
        raise CompressionError(
            f"Expected `{name}` to be training data, but got evaluation data; pass the first of "
            "data_preparation(config, dataset)."
        )
    dataset = getattr(data, "_dataset", data)
    if hasattr(dataset, "inter_feat"):
        return _of_dataset(dataset, n_items, max_length, name)
    if not isinstance(data, Sequence | Tensor | np.ndarray):
        raise CompressionError(
            "Expected `data` to be RecBole's training data or lists of item ids, but got "
            f"{type(data).__name__}."
        )
    if not len(data):
        raise CompressionError("Expected `data` to hold histories, but it is empty.")
    histories: Any = data
    _, whole = pad_histories(histories, n_items, max_length, "data")
    pieces = []
    for row in whole:
        real = row[row != PADDING]
        # from the newest back; a target is the item after its position, so pieces overlap by one
        for end in range(len(real), 1, -max_length):
            piece = real[max(0, end - max_length - 1) : end]
            pieces.append(torch.nn.functional.pad(piece, (0, max_length + 1 - len(piece))))
    if not pieces:
        raise CompressionError(
            "Expected `data` to hold a history of two items or more, but got none; there is no "
            "next item to learn from."
        )
    rows = torch.stack(pieces)
    targets = rows[:, 1:]
    return Histories(rows[:, :-1].masked_fill(targets == PADDING, PADDING), targets)


def _of_dataset(dataset: Any, n_items: int, max_length: int, name: str) -> Histories:
    lists = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if int(dataset.item_num) != n_items or not len(dataset):
        raise CompressionError(
            f"Expected `{name}` to be of the model's {n_items} items (padding included), but got "
            f"{len(dataset)} rows of a data set of {int(dataset.item_num)}."
        )
    fields = dataset.inter_feat
    if isinstance(fields, SequenceRows):
        size = min(max_length, fields.pointers.longest)
        ids = fields.lists()[lists]
        windows = Windows.of(fields.pointers, len(ids), size)
        pieces = torch.arange(len(windows.ends)).split(_ROWS)
        gathered = [windows.gather(ids, piece, size) for piece in pieces]
        return Histories(*(torch.cat(parts) for parts in zip(*gathered)))
    if dataset.item_list_length_field not in fields:
        raise CompressionError(
            f"Expected `{name}` to be training data of a sequential model, but got a data set that "
            "has not been split; pass the first of data_preparation(config, dataset)."
        )
    return _of_prefixes(dataset, lists, max_length)


def _of_prefixes(dataset: Any, lists: str, max_length: int) -> Histories:
    """RecBole's row for every prefix, brought back into windows: rows of which each has the history
    of the one before it and its target are one sequence, whatever order they lie in by user. What
    belongs to no other row is a window with one target."""
    users = np.asarray(dataset.inter_feat[dataset.uid_field])
    order = np.argsort(users, kind="stable")
    follows = _follow(dataset, lists, order)
    if follows.sum() < len(order) - len(np.unique(users)):  # perhaps the longest are first
        turned = order[::-1].copy()
        other = _follow(dataset, lists, turned)
        if other.sum() > follows.sum():
            order, follows = turned, other
    size = min(max_length, dataset[torch.zeros(1, dtype=torch.int64)][lists].shape[1])
    begins = torch.from_numpy(np.maximum.accumulate(np.where(follows, 0, np.arange(len(order)))))
    windows = Windows.of(Pointers(begins, torch.arange(len(order)), size), len(order), size)
    lasts, n_targets = windows.rows, windows.lengths
    found = []
    for piece, items, length, batch in _gathered(dataset, lists, torch.from_numpy(order)[lasts]):
        following = torch.cat([items[:, 1:], items.new_zeros(len(items), 1)], dim=1)
        following[torch.arange(len(items)), length - 1] = batch[dataset.iid_field]
        column = torch.arange(items.shape[1])
        following[column < (length - n_targets[piece]).unsqueeze(1)] = PADDING
        found.append([_until(each, length, size) for each in (items, following)])
    return Histories(*(torch.cat(parts) for parts in zip(*found)))


def _gathered(
    dataset: Any, lists: str, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Any]]:
    """Places among the rows, their lists `[n, L]`, lengths `[n]` and all fields, some at a time:
    gathering takes several times its result."""
    for piece in torch.arange(len(rows)).split(_ROWS):
        batch = dataset[rows[piece]]
        yield piece, batch[lists], batch[dataset.item_list_length_field], batch


def _follow(dataset: Any, lists: str, order: np.ndarray) -> np.ndarray:
    """Whether each row, in an order, has the history of the row before it and then that one's
    target, of which RecBole keeps the newest items, `[n]`."""
    found = np.zeros(len(order), dtype=bool)
    before = None  # user and history that the next row would have
    for piece, items, lengths, batch in _gathered(dataset, lists, torch.from_numpy(order)):
        users = batch[dataset.uid_field]
        longer = torch.cat([items, items.new_zeros(len(items), 1)], dim=1)
        longer[torch.arange(len(items)), lengths] = batch[dataset.iid_field]
        longer = _until(longer, lengths + 1, items.shape[1])
        found[piece[1:]] = ((users[1:] == users[:-1]) & (items[1:] == longer[:-1]).all(1)).numpy()
        if before is not None:
            found[piece[0]] = users[0] == before[0] and torch.equal(items[0], before[1])
        before = users[-1], longer[-1]
    return found


def _until(lists: Tensor, ends: Tensor, size: int) -> Tensor:
    """The `size` columns before an end of each row, fewer where it has fewer, with padding behind
    them: `[n, L], [n] -> [n, size]`."""
    columns = (ends - size).clamp(min=0).unsqueeze(1) + torch.arange(size)
    kept = lists.gather(1, columns.clamp(max=lists.shape[1] - 1))
    return kept.masked_fill(columns >= ends.unsqueeze(1), PADDING)


def drawn_histories(counts: np.ndarray, n: int, length: int, generator: torch.Generator) -> Tensor:
    """Histories of items drawn by how often they occur, `[n, length]`.

    They have no order to learn, but they reach every layer with the vectors that it will see: a
    stand-in where no data is at hand.
    """
    weights = torch.from_numpy(counts).double()
    weights = torch.where(weights.sum() > 0, weights, torch.ones_like(weights))
    weights[PADDING] = 0
    edges = weights.cumsum(0)
    draws = torch.rand(n, length, generator=generator, dtype=torch.float64) * edges[-1]
    items = torch.searchsorted(edges, draws, right=True).clamp(1, len(counts) - 1)
    # users differ in how much they did, and the newest positions must be well covered
    lengths = torch.randint(1, length + 1, (n, 1), generator=generator)
    return items.masked_fill(torch.arange(length) >= lengths, PADDING)
