"""The rows of RecBole's sequential data sets, which point into the interactions, kept once by user
and time. RecBole writes every prefix of every history into a matrix; its answers are the same."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Row numbers by key, equal keys in the order they had, `[n]`."""
    # PyTorch sorts whole numbers by their digits: at ten million a quarter of NumPy's time
    keys = np.require(keys, requirements="W")  # of pandas they may be read-only: torch warns
    return torch.from_numpy(keys).argsort(stable=True).numpy()


class Pointers(NamedTuple):
    """Where the history of each row lies in the interactions by user, then time."""

    begins: Tensor  # a row's user's first interaction, [n]
    ends: Tensor  # a row's target, which its history lies before, [n]
    longest: int  # items that a history has at most; of a longer one the newest


class List(NamedTuple):
    """A column of lists, which are not gathered yet."""

    values: Tensor  # of all interactions, [n_interactions, ...]
    pointers: Pointers

    def gathered(self) -> Tensor:
        """The list of each row, padded with 0 on the right, `[n, longest, ...]`."""
        begins, ends, longest = self.pointers
        return gather(self.values, torch.maximum(begins, ends - longest), ends, longest)


def gather(values: Tensor, starts: Tensor, ends: Tensor, longest: int) -> Tensor:
    """`values[start:end]` of each row, padded with 0 on the right, `[n, longest, ...]`."""
    index = starts.unsqueeze(-1) + torch.arange(longest)
    taken = values[index.clamp(max=len(values) - 1)]
    outside = index >= ends.unsqueeze(-1)
    return taken.masked_fill(outside.reshape(*outside.shape, *[1] * (values.dim() - 1)), 0)


class _Columns(UserDict[str, Any]):
    """An Interaction's columns by name; a list is gathered each time that it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        column = self.data[name]
        return column.gathered() if isinstance(column, List) else column


class SequenceRows(Interaction):
    """RecBole's Interaction with a row for each target with a history; columns are `[n, ...]` or a
    List. Rows that are taken by an index are an Interaction with everything in it."""

    interaction: _Columns

    def __init__(self, columns: dict[str, Tensor | List], pointers: Pointers) -> None:
        super().__init__({})
        self.interaction = _Columns(columns)
        self.pointers = pointers
        self.length = pointers.ends.numel()

    def lists(self) -> dict[str, Tensor]:
        """What the lists are made from, by name, `[n_interactions, ...]`."""
        columns = self.interaction.data
        return {name: c.values for name, c in columns.items() if isinstance(c, List)}

    def columns_kept(self) -> dict[str, Tensor]:
        """All that the rows are made from, by name."""
        begins, ends, _ = self.pointers
        return {**self.interaction.data, **self.lists(), "begins": begins, "ends": ends}

    def take(self, rows: Any) -> SequenceRows:
        """Some rows, their lists still to be gathered."""
        begins, ends, longest = self.pointers
        pointers = Pointers(begins[rows], ends[rows], longest)
        columns = {
            name: List(column.values, pointers) if isinstance(column, List) else column[rows]
            for name, column in self.interaction.data.items()
        }
        return SequenceRows(columns, pointers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.interaction[index]
        if isinstance(index, np.ndarray | Tensor):
            index = index.tolist()  # as RecBole does
        return Interaction(dict(self.take(index).interaction))

    def _reindex(self, index: Any) -> None:
        rows = self.take(index)
        self.interaction, self.pointers = rows.interaction, rows.pointers

    def add_prefix(self, prefix: str) -> None:
        """Put a prefix before the name of each column."""
        columns = self.interaction.data
        self.interaction = _Columns({prefix + name: columns[name] for name in columns})


def item_counts(dataset: Any) -> np.ndarray:
    """Training interactions of each item id of a RecBole dataset, `[n_items]`. The first item of a
    history, which is no target, counts where its user's first target is there."""
    feat, n_items = dataset.inter_feat, dataset.item_num
    counts = np.bincount(np.asarray(feat[dataset.iid_field]), minlength=n_items)
    length = getattr(dataset, "item_list_length_field", "")
    items = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if length not in feat or items not in feat:
        return counts
    lengths = feat[length]
    if isinstance(feat, SequenceRows):  # which know the length of histories that are cut
        lengths = feat.pointers.ends - feat.pointers.begins
    short = np.flatnonzero(np.asarray(lengths) == 1)
    # under a limit of one item every row has such a history: of a user it is the first
    users = np.asarray(feat[dataset.uid_field])[short]
    firsts = short[np.unique(users, return_index=True)[1]]
    return counts + np.bincount(feat[firsts][items][:, 0], minlength=n_items)
