"""The rows of RecBole's sequential data sets, their lists gathered when they are asked for.

RecBole writes every prefix of every history into a matrix before training. Here the interactions
are kept once, sorted by user and time, with rows that point into them. Whatever a data set is asked
for, RecBole's own or one of the user's class, the answer is RecBole's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.data import splits


class Pointers(NamedTuple):
    """Where the history of each row lies in the interactions by user, then time.

    Attributes:
        lists: columns of all interactions, by the names of their lists, `[n_interactions, ...]`.
        begins: a row's user's first interaction, `[n]`.
        ends: a row's target, which its history lies before, `[n]`.
        longest: items that a history has at most; of a longer one the newest.
    """

    lists: dict[str, Tensor]
    begins: Tensor
    ends: Tensor
    longest: int

    def take(self, rows: Any) -> Pointers:
        """The pointers of some rows."""
        return self._replace(begins=self.begins[rows], ends=self.ends[rows])

    def gather(self, name: str) -> Tensor:
        """The histories of all rows, padded with 0 on the right, `[n, longest, ...]`."""
        starts = torch.maximum(self.begins, self.ends - self.longest)
        return gather(self.lists[name], starts, self.ends, self.longest)


def gather(values: Tensor, starts: Tensor, ends: Tensor, longest: int) -> Tensor:
    """`values[start:end]` of each row, padded with 0 on the right, `[n, longest, ...]`."""
    index = starts.unsqueeze(-1) + torch.arange(longest)
    found = values[index.clamp(max=len(values) - 1)]
    outside = index >= ends.unsqueeze(-1)
    return found.masked_fill(outside.reshape(*outside.shape, *[1] * (values.dim() - 1)), 0)


class _Columns(dict[str, Any]):
    """An Interaction's columns by name; a list is gathered each time that it is asked for."""

    def __init__(self, columns: dict[str, Tensor | None], pointers: Pointers) -> None:
        super().__init__(columns)
        self.pointers = pointers

    def __getitem__(self, name: str) -> Tensor:
        column = super().__getitem__(name)
        return self.pointers.gather(name) if column is None else column

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # so that dict(self) and update(self) ask for each column

    def get(self, name: str, default: Any = None) -> Any:
        found = super().get(name, default)
        return self[name] if name in self and found is None else found

    def setdefault(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else super().setdefault(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        found = self.get(name)
        super().pop(name, *default)
        return found if found is not None else default[0]

    def popitem(self) -> tuple[str, Tensor]:
        name = next(reversed(self))
        return name, self.pop(name)

    def values(self) -> list[Tensor]:  # type: ignore[override]
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, Tensor]]:  # type: ignore[override]
        return [(name, self[name]) for name in self]

    def copy(self) -> dict[str, Tensor]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def kept(self) -> dict[str, Tensor | None]:
        """The columns as they are kept; None for a list."""
        return dict(super().items())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Columns, (self.kept(), self.pointers)


class SequenceRows(Interaction):
    """RecBole's Interaction of a sequential data set: a row for each target with a history.

    Rows that are taken by an index, as for a batch, are an Interaction with everything in it.

    Args:
        columns: what is kept, `[n, ...]` each; None for the lists.
        pointers: where the lists lie.
    """

    interaction: _Columns

    def __init__(self, columns: dict[str, Tensor | None], pointers: Pointers) -> None:
        super().__init__({})
        self.interaction = _Columns(columns, pointers)
        self.length = len(pointers.ends)

    @property
    def pointers(self) -> Pointers:
        """Where the history of each row lies."""
        return self.interaction.pointers

    def columns_kept(self) -> dict[str, Tensor]:
        """All that the rows are made from, by name: `[n]`, or `[n_interactions]` for a list."""
        _, begins, ends, _ = self.pointers
        columns = {**self.interaction.kept(), **self.pointers.lists}
        found = {name: column for name, column in columns.items() if column is not None}
        return {**found, "begins": begins, "ends": ends}

    def take(self, rows: Any) -> SequenceRows:
        """Some rows, their lists still to be gathered."""
        if isinstance(rows, np.ndarray):
            rows = torch.from_numpy(rows) if rows.size else []
        kept = self.interaction.kept()
        columns = {k: None if column is None else column[rows] for k, column in kept.items()}
        return SequenceRows(columns, self.pointers.take(rows))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.interaction[index]
        if isinstance(index, np.ndarray | Tensor) and (
            index.ndim != 1 or str(index.dtype).removeprefix("torch.") not in ("int64", "bool")
        ):
            index = index.tolist()  # as RecBole does with all of them
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            row = self[[int(index)]].interaction
            return Interaction({name: column[0] for name, column in row.items()})
        return Interaction(dict(self.take(index).interaction.items()))

    def _reindex(self, index: Any) -> None:
        self.interaction = self.take(index).interaction

    def add_prefix(self, prefix: str) -> None:
        """Put a prefix before the name of each column."""
        pointers, kept = self.pointers, self.interaction.kept()
        lists = {prefix + name: column for name, column in pointers.lists.items()}
        columns = {prefix + name: column for name, column in kept.items()}
        self.interaction = _Columns(columns, pointers._replace(lists=lists))


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
        lists = {
            getattr(self, f"{field}_list_field"): column
            for field, column in feat.interaction.items()
            if field != self.uid_field
        }
        columns = {field: column[rows] for field, column in feat.interaction.items()}
        lengths = torch.from_numpy(np.minimum(ends - begins, longest))
        columns |= {self.item_list_length_field: lengths, **dict.fromkeys(lists)}
        pointers = Pointers(lists, torch.from_numpy(begins), rows, longest)
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


def by_leaving_out(original: Callable) -> Callable:
    """RecBole's `leave_one_out`, on arrays."""

    def leave_one_out(self: Any, group_by: str | None, leave_one_mode: str) -> list[Any]:
        if group_by is None or not isinstance(self.inter_feat, SequenceRows):
            return original(self, group_by, leave_one_mode)
        groups = splits.Groups.of(self.inter_feat[group_by].numpy())
        lengths = splits.leave_one_out(groups.sizes, leave_one_mode)
        if lengths is None:
            return original(self, group_by, leave_one_mode)
        parts = groups.cut(lengths)
        del groups  # as large as all parts together
        return _divided(self, parts)

    return leave_one_out


def by_ratios(original: Callable) -> Callable:
    """RecBole's `split_by_ratio`, on arrays."""

    def split_by_ratio(self: Any, ratios: list[float], group_by: str | None = None) -> list[Any]:
        if not isinstance(self.inter_feat, SequenceRows):
            return original(self, ratios, group_by)
        values = np.zeros(len(self)) if group_by is None else self.inter_feat[group_by].numpy()
        groups = splits.Groups.of(values)
        shares = [ratio / sum(ratios) for ratio in ratios]
        cuts_of = partial(self._calcu_split_ids, ratios=shares)
        return _divided(self, groups.cut(splits.by_ratio(groups.sizes, cuts_of)))

    return split_by_ratio


def by_time(original: Callable) -> Callable:
    """RecBole's `time_based_split`, on arrays where the rows are in order of time."""

    def time_based_split(self: Any, ratios: list[float], group_by: str | None) -> list[Any]:
        feat = self.inter_feat
        known = isinstance(feat, SequenceRows) and self.time_field in feat
        times = feat[self.time_field].numpy() if known else None
        if group_by is None or times is None or len(ratios) != 3 or (np.diff(times) < 0).any():
            return original(self, ratios, group_by)
        train, _, test = (ratio / sum(ratios) for ratio in ratios)
        is_early = times <= np.percentile(times, 100 * (1 - test))
        groups = splits.Groups.of(feat[group_by].numpy())
        return _divided(self, groups.cut(splits.by_time(groups, is_early, train / (1 - test))))

    return time_based_split


def _divided(dataset: Any, parts: list[np.ndarray]) -> list[Any]:
    """A data set for the rows of each part."""
    dataset._drop_unused_col()
    return [dataset.copy(dataset.inter_feat.take(rows)) for rows in parts]


def item_counts(dataset: Any) -> np.ndarray:
    """Training interactions of each item id, `[n_items]`; the first item of a history, which is no
    target, counts where its user's first target is there.

    Args:
        dataset: a RecBole dataset, best the training split that a model is built with.
    """
    feat, n_items = dataset.inter_feat, dataset.item_num
    counts = np.bincount(np.asarray(feat[dataset.iid_field]), minlength=n_items)
    item_list = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if isinstance(feat, SequenceRows):
        pointers = feat.pointers
        firsts = pointers.begins[pointers.ends - pointers.begins == 1]
        return counts + np.bincount(pointers.lists[item_list][firsts], minlength=n_items)
    length = getattr(dataset, "item_list_length_field", "")
    if length in feat and item_list in feat:
        first = _first_targets(np.asarray(feat[dataset.uid_field]), np.asarray(feat[length]))
        counts += np.bincount(np.asarray(feat[item_list])[first, 0], minlength=n_items)
    return counts


def _first_targets(users: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows whose history is a user's very first item: of rows in order of time, a user's first with
    a history of one. (Under a limit of one item every row has such a history.)"""
    short = np.flatnonzero(lengths == 1)
    return short[np.unique(users[short], return_index=True)[1]]
