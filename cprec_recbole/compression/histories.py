"""Histories to fit on: windows of what users did, each training target at one position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.data.sequences import Pointers, SequenceRows, stable_order
from cprec_recbole.data.windows import Windows
from cprec_recbole.models.inputs import pad_histories
from cprec_recbole.partition import PADDING

_ROWS = 2**14  # of a data set that are gathered together


class Histories(NamedTuple):
    """Windows of item ids, padded with 0 on the right."""

    items: Tensor  # what was read, [N, L]
    targets: Tensor  # the next item at each position, [N, L]

    def prefixes(self) -> tuple[Tensor, Tensor]:
        """Each target with the items before it in its window, `[M, L], [M]`."""
        row, column = (self.targets != PADDING).nonzero(as_tuple=True)
        later = torch.arange(self.items.shape[1]) > column.unsqueeze(1)
        return self.items[row].masked_fill(later, PADDING), self.targets[row, column]


def sample(items: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """At most n histories out of `[N, L]`, drawn without replacement."""
    return items if len(items) <= n else items[torch.randperm(len(items), generator=generator)[:n]]


def dataset_of(data: Any) -> Any:
    """The RecBole data set that data is or loads from; None for anything else."""
    dataset = getattr(data, "_dataset", data)
    return dataset if hasattr(dataset, "inter_feat") else None


def histories_of(data: Any, n_items: int, max_length: int, name: str = "data") -> Histories:
    """Windows of RecBole's training data set or data loader, or of lists of item ids, oldest first.
    Refuses other data, empty data, and another catalogue than of `n_items`; the error has the name.
    """
    if isinstance(data, FullSortEvalDataLoader | NegSampleEvalDataLoader):
        raise CompressionError(
            f"Expected `{name}` to be training data, but got evaluation data; pass the first of "
            "data_preparation(config, dataset)."
        )
    dataset = dataset_of(data)
    if dataset is not None:
        return _windows(*_sequences_of(dataset, n_items, name), max_length)
    if not isinstance(data, Sequence | Tensor | np.ndarray):
        raise CompressionError(
            f"Expected `{name}` to be RecBole's training data or lists of item ids, but got "
            f"{type(data).__name__}."
        )
    *_, whole = pad_histories(data, n_items, max_length, name)
    lengths = (whole != PADDING).sum(1)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    has_history = torch.arange(len(begins)) > begins
    if not has_history.any():
        raise CompressionError(
            f"Expected `{name}` to hold a history of two items or more, but got none; there is no "
            "next item to learn from."
        )
    pointers = Pointers(begins[has_history], has_history.nonzero()[:, 0], max_length)
    return _windows(whole[whole != PADDING], pointers, max_length)


def _sequences_of(dataset: Any, n_items: int, name: str) -> tuple[Tensor, Pointers]:
    """The items of all users, `[n_interactions]`, and where the rows of a data set lie in them."""
    feat, lists = dataset.inter_feat, dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if int(dataset.item_num) != n_items or not len(dataset):
        raise CompressionError(
            f"Expected `{name}` to be of the model's {n_items} items (padding included), but got "
            f"{len(dataset)} rows of a data set of {int(dataset.item_num)}."
        )
    if isinstance(feat, SequenceRows):
        return feat.lists()[lists], feat.pointers
    if dataset.item_list_length_field not in feat:
        raise CompressionError(
            f"Expected `{name}` to be training data of a sequential model, but got a data set that "
            "has not been split; pass the first of data_preparation(config, dataset)."
        )
    names = (dataset.uid_field, lists, dataset.item_list_length_field, dataset.iid_field)
    return _rejoined(*(feat[each] for each in names))


def _windows(items: Tensor, pointers: Pointers, max_length: int) -> Histories:
    """The windows of sequences, some at a time: gathering takes several times its result."""
    size = min(max_length, pointers.longest)
    windows = Windows.of(pointers, len(items), size)
    pieces = torch.arange(len(windows.ends)).split(_ROWS)
    parts = [windows.gather(items, piece, size) for piece in pieces]
    return Histories(*(torch.cat(part) for part in zip(*parts)))


def _rejoined(
    users: Tensor, items: Tensor, lengths: Tensor, targets: Tensor
) -> tuple[Tensor, Pointers]:
    """RecBole's row for every prefix, `[n, L]` with `[n]`, as the sequences that they come from:
    rows of which each has the history of the one before it and then its target."""
    order = torch.from_numpy(stable_order(users.numpy()))
    orders = (order, order.flip(0))  # benchmark files may have a user's longest history first
    found = [_follows(users, items, lengths, targets, each) for each in orders]
    order, follows = max(zip(orders, found), key=lambda each: int(each[1].sum()))
    # a sequence is the history of its first row, then the target of each
    firsts = order[~follows]
    ends = torch.where(follows, 1, lengths[order] + 1).cumsum(0) - 1
    begins = (ends - lengths[order])[~follows][(~follows).cumsum(0) - 1]
    sequence = torch.empty(int(ends[-1]) + 1, dtype=torch.int64)
    is_target = torch.zeros(len(sequence), dtype=torch.bool)
    is_target[ends] = True
    sequence[is_target] = targets[order]
    sequence[~is_target] = items[firsts][torch.arange(items.shape[1]) < lengths[firsts, None]]
    return sequence, Pointers(begins, ends, items.shape[1])


def _follows(
    users: Tensor, items: Tensor, lengths: Tensor, targets: Tensor, order: Tensor
) -> Tensor:
    """Whether each row, in an order, is of the user of the row before it and has the newest items
    of that one's history and then its target, `[n]`."""
    parts = [torch.zeros(1, dtype=torch.bool)]
    for before, after in zip(order[:-1].split(_ROWS), order[1:].split(_ROWS)):
        longer = torch.nn.functional.pad(items[before], (0, 1))
        longer[torch.arange(len(before)), lengths[before]] = targets[before]
        is_full = (lengths[before] == items.shape[1]).unsqueeze(1)
        expected = torch.where(is_full, longer[:, 1:], longer[:, :-1])
        parts.append((items[after] == expected).all(1) & (users[after] == users[before]))
    return torch.cat(parts)


def drawn_histories(counts: np.ndarray, n: int, length: int, generator: torch.Generator) -> Tensor:
    """Histories of items drawn by how often they occur, `[n, length]`, where no data is at hand."""
    weights = torch.from_numpy(counts).double()
    weights = torch.where(weights.sum() > 0, weights, torch.ones_like(weights))
    weights[PADDING] = 0
    edges = weights.cumsum(0)
    draws = torch.rand(n, length, generator=generator, dtype=torch.float64) * edges[-1]
    items = torch.searchsorted(edges, draws, right=True).clamp(1, len(counts) - 1)
    # users differ in how much they did, and the newest positions must be well covered
    lengths = torch.randint(1, length + 1, (n, 1), generator=generator)
    return items.masked_fill(torch.arange(length) >= lengths, PADDING)
