"""The rows of RecBole's sequential data sets, their lists gathered when they are asked for.

RecBole writes every prefix of every history into a matrix before training. Here the interactions
are kept once, sorted by user and time, with rows that point into them. Whatever a data set is asked
for, RecBole's own or one of the user's class, the answer is RecBole's.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from cprec_recbole.config import CompressionError


class Pointers(NamedTuple):
    """Where the history of each row lies in the interactions by user, then time.

    Attributes:
        begins: a row's user's first interaction, `[n]`.
        ends: a row's target, which its history lies before, `[n]`.
        longest: items that a history has at most; of a longer one the newest.
    """

    begins: Tensor
    ends: Tensor
    longest: int


class List(NamedTuple):
    """A column of lists, which are not gathered yet.

    Attributes:
        values: of all interactions, `[n_interactions, ...]`.
        pointers: of the rows.
    """

    values: Tensor
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
    """RecBole's Interaction of a sequential data set: a row for each target with a history.

    Rows that are taken by an index, as for a batch, are an Interaction with everything in it.

    Args:
        columns: by name, `[n, ...]` each, or a List.
        pointers: where the lists lie.
    """

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

    def others(self) -> dict[str, Tensor]:
        """The columns that are no lists, by name, `[n, ...]`."""
        columns = self.interaction.data
        return {name: c for name, c in columns.items() if not isinstance(c, List)}

    def columns_kept(self) -> dict[str, Tensor]:
        """All that the rows are made from, by name."""
        begins, ends, _ = self.pointers
        return {**self.others(), **self.lists(), "begins": begins, "ends": ends}

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


def of_prefixes(original: Callable) -> Callable:
    """RecBole's `data_augmentation`: a row for each interaction that has any before it."""

    def data_augmentation(self: Any) -> None:
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        feat = self.inter_feat
        users = feat[self.uid_field].numpy()
        is_first = np.ones(len(users), dtype=bool)
        is_first[1:] = users[1:] != users[:-1]
        ends, firsts = np.flatnonzero(~is_first), np.flatnonzero(is_first)
        if not len(ends):
            raise no_targets()
        begins = np.repeat(firsts, np.diff(firsts, append=len(users)) - 1)
        rows, longest = torch.from_numpy(ends), self.config["MAX_ITEM_LIST_LENGTH"]
        pointers = Pointers(torch.from_numpy(begins), rows, longest)
        columns = {field: column[rows] for field, column in feat.interaction.items()}
        lengths = (pointers.ends - pointers.begins).clamp(max=longest)
        columns[self.item_list_length_field] = lengths
        for field, column in feat.interaction.items():
            if field != self.uid_field:
                columns[getattr(self, f"{field}_list_field")] = List(column, pointers)
        self.inter_feat = SequenceRows(columns, pointers)

    return data_augmentation


def with_targets(original: Callable) -> Callable:
    """RecBole's `build` of a sequential data set; a training part without a row is refused."""

    def build(self: Any) -> list[Any]:
        parts = original(self)
        if not len(parts[0]):
            raise no_targets()
        return parts

    return build


def no_targets() -> CompressionError:
    """The error for data in which there is nothing to learn."""
    return CompressionError(
        "Expected the training split to hold a target with a history before it, but it is "
        "empty; users need at least two interactions, and four to be in every split."
    )


def item_counts(dataset: Any) -> np.ndarray:
    """Training interactions of each item id, `[n_items]`; the first item of a history, which is no
    target, counts where its user's first target is there.

    Args:
        dataset: a RecBole dataset, best the training split that a model is built with.
    """
    feat, n_items = dataset.inter_feat, dataset.item_num
    counts = np.bincount(np.asarray(feat[dataset.iid_field]), minlength=n_items)
    length = getattr(dataset, "item_list_length_field", "")
    items = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if length not in feat or items not in feat:
        return counts
    if isinstance(feat, SequenceRows):  # which know the length of histories that are cut
        lengths = feat.pointers.ends - feat.pointers.begins
    else:
        lengths = feat[length]
    short = np.flatnonzero(np.asarray(lengths) == 1)
    # under a limit of one item every row has such a history: of a user it is the first
    users = np.asarray(feat[dataset.uid_field])[short]
    firsts = short[np.unique(users, return_index=True)[1]]
    return counts + np.bincount(feat[firsts][items][:, 0], minlength=n_items)
