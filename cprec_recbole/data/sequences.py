"""Training and evaluation rows for sequence models, made on demand from one sorted sequence.

RecBole's own dataset writes every prefix of every history into a matrix before training. This one
keeps the interactions once, sorted by user and time, and rows that point into them; item lists are
gathered for a batch when it is asked for. The evaluation rows are the same as RecBole's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.data import splits
from cprec_recbole.data.interactions import InteractionsDataset
from cprec_recbole.fields import NEXT_ITEMS

_END = "_history_end"  # a row's history: sequence[end - length : end]


class PositionsDataset(InteractionsDataset):
    """RecBole's SequentialDataset, with the papers' objective as an option.

    `training: all_positions`: the training rows are windows of at most `MAX_ITEM_LIST_LENGTH`
    items, each training interaction the target of exactly one position. `training: last_position`:
    a row for every prefix, as RecBole makes them. Validation and test rows are RecBole's in both.
    """

    inter_feat: Interaction
    _sequence: Tensor  # item ids of all interactions by user, then time, [n_interactions]
    _item_counts: np.ndarray

    def _change_feat_format(self) -> None:
        if self.config["benchmark_filename"] is not None and self._windows:
            raise CompressionError(
                "Expected `training` to be last_position with `benchmark_filename`, whose files "
                "hold prefixes and not sequences, but got all_positions."
            )
        super()._change_feat_format()

    @property
    def _windows(self) -> bool:
        return self.config["training"] != "last_position"

    def data_augmentation(self) -> None:
        """Turn interactions into rows that point at a history; one for each that has any."""
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        users = self.inter_feat[self.uid_field].numpy()
        self._sequence = self.inter_feat[self.iid_field]
        is_first = np.ones(len(users), dtype=bool)
        is_first[1:] = users[1:] != users[:-1]
        ends = np.flatnonzero(~is_first)
        if not len(ends):
            raise _no_targets()
        firsts = np.flatnonzero(is_first)
        n_targets = np.diff(firsts, append=len(users)) - 1
        lengths = np.minimum(ends - np.repeat(firsts, n_targets), self.max_item_list_len)
        rows = _take(self.inter_feat, ends)
        rows.update(self._pointers(ends, lengths))
        self.inter_feat = rows

    def build(self) -> list[SequentialDataset]:
        """Split as RecBole does; where every position is trained, training rows become windows."""
        train, *others = super().build()
        if not len(train):
            raise _no_targets()
        return [train, *others]

    def leave_one_out(self, group_by: str | None, leave_one_mode: str) -> list[SequentialDataset]:
        """Split off each group's last rows, as RecBole does."""
        if group_by is None:
            return super().leave_one_out(group_by, leave_one_mode)
        groups = splits.Groups.of(self.inter_feat[group_by].numpy())
        lengths = splits.leave_one_out(groups.sizes, leave_one_mode)
        if lengths is None:
            return super().leave_one_out(group_by, leave_one_mode)
        parts = groups.cut(lengths)
        del groups  # as large as all parts together
        return self._divide(parts)

    def split_by_ratio(
        self, ratios: list[float], group_by: str | None = None
    ) -> list[SequentialDataset]:
        """Split each group by ratios, or all rows where there are no groups, as RecBole does."""
        if group_by is None:
            groups = splits.Groups.of(np.zeros(len(self)))
        else:
            groups = splits.Groups.of(self.inter_feat[group_by].numpy())
        total = sum(ratios)
        shares = [ratio / total for ratio in ratios]
        cuts_of = partial(self._calcu_split_ids, ratios=shares)
        return self._divide(groups.cut(splits.by_ratio(groups.sizes, cuts_of)))

    def time_based_split(
        self, ratios: list[float], group_by: str | None
    ) -> list[SequentialDataset]:
        """Split at a point in time, and each group's rows before it by ratios, as RecBole does."""
        times = (
            self.inter_feat[self.time_field].numpy() if self.time_field in self.inter_feat else None
        )
        if group_by is None or times is None or len(ratios) != 3 or (np.diff(times) < 0).any():
            return super().time_based_split(ratios, group_by)
        total = sum(ratios)
        train, _, test = (ratio / total for ratio in ratios)
        is_early = times <= np.percentile(times, 100 * (1 - test))
        groups = splits.Groups.of(self.inter_feat[group_by].numpy())
        return self._divide(groups.cut(splits.by_time(groups, is_early, train / (1 - test))))

    def _divide(self, parts: list[np.ndarray]) -> list[SequentialDataset]:
        """A data set for the rows of each part, the first of them for training."""
        self._drop_unused_col()
        others = [self.copy(_take(self.inter_feat, rows)) for rows in parts[1:]]
        rows = parts[0]
        by_time = rows[splits.stable_order(self.inter_feat[_END].numpy()[rows])]  # and by user
        train = self.copy(
            self._windows_of(by_time) if self._windows else _take(self.inter_feat, rows)
        )
        train._item_counts = self._count_items(by_time)
        return [train, *others]

    def item_counts(self) -> np.ndarray:
        """Interactions of each item id in this split, `[n_items]`; first items of a history count
        where the split holds its first target."""
        if hasattr(self, "_item_counts"):
            return self._item_counts
        return self._count_items(np.arange(len(self)))

    def targets_per_row(self) -> float:
        """Mean number of predictions that a training row asks for."""
        return float(self.inter_feat[self.item_list_length_field].float().mean())

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        rows = super().__getitem__(index, join)
        if _END not in rows:
            return rows
        ends = rows[_END]
        starts = ends - rows[self.item_list_length_field]
        rows[self.iid_field + self.config["LIST_SUFFIX"]] = self._gather(starts, ends)
        if NEXT_ITEMS in rows:
            rows[NEXT_ITEMS] = self._gather(starts + 1, ends + 1)
        return rows

    def _gather(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Item ids of `sequence[start:end]`, padded on the right, `[B] -> [B, max length]`."""
        index = starts.unsqueeze(-1) + torch.arange(self.max_item_list_len)
        items = self._sequence[index.clamp(max=len(self._sequence) - 1)]
        return items.masked_fill(index >= ends.unsqueeze(-1), 0)

    def _pointers(self, ends: np.ndarray, lengths: np.ndarray) -> Interaction:
        return Interaction(
            {self.item_list_length_field: torch.from_numpy(lengths), _END: torch.from_numpy(ends)}
        )

    def _count_items(self, rows: np.ndarray) -> np.ndarray:
        """Targets of rows, and the first item of each history that has one, `[n] -> [n_items]`."""
        sequence, ends = self._sequence.numpy(), self.inter_feat[_END].numpy()
        columns = (self.uid_field, self.item_list_length_field)
        first = _first_targets(*(self.inter_feat[column].numpy()[rows] for column in columns))
        counts = np.bincount(sequence[ends[rows]], minlength=self.item_num)
        return counts + np.bincount(sequence[ends[rows[first]] - 1], minlength=self.item_num)

    def _windows_of(self, rows: np.ndarray) -> Interaction:
        """Cut each user's training targets into windows, from the newest back: only the oldest
        window of a user is short.

        Args:
            rows: by user, then time, `[n]`.
        """
        users = self.inter_feat[self.uid_field].numpy()[rows]
        newest = window_rows(users, self.max_item_list_len)
        windows = _take(self.inter_feat, rows[newest])
        lengths = np.diff(newest, prepend=-1)
        windows.update(self._pointers(windows[_END].numpy(), lengths))
        windows[NEXT_ITEMS] = torch.zeros(len(newest), 0, dtype=torch.int64)
        return windows


def _no_targets() -> CompressionError:
    return CompressionError(
        "Expected the training split to hold a target with a history before it, but it is "
        "empty; users need at least two interactions, and four to be in every split."
    )


def _take(feat: Interaction, rows: np.ndarray) -> Interaction:
    """Rows of an Interaction, which would turn their numbers into Python ints first."""
    index = torch.from_numpy(rows)
    return Interaction({name: column[index] for name, column in feat.interaction.items()})


def window_rows(users: np.ndarray, length: int) -> np.ndarray:
    """The last row of each window, `[n_windows]`, of rows with one target each by user, then time.

    From a user's newest row back, so that only the oldest window of a user is short.
    """
    is_last = np.ones(len(users), dtype=bool)
    is_last[:-1] = users[1:] != users[:-1]
    lasts = np.flatnonzero(is_last)
    n_windows = -(-np.diff(lasts, prepend=-1) // length)
    ends = np.cumsum(n_windows)
    n_newer = np.repeat(ends, n_windows) - np.arange(1, n_windows.sum() + 1)  # of the same user
    return np.repeat(lasts, n_windows) - n_newer * length


class PositionsDataLoader(TrainDataLoader):
    """RecBole's TrainDataLoader where `train_batch_size` counts predictions, as everywhere else.

    A window asks for many predictions; 2,048 windows a step would make one step an epoch.
    """

    step: int

    def _init_batch_size_and_step(self) -> None:
        super()._init_batch_size_and_step()
        self.step = max(1, round(self.step / self._dataset.targets_per_row()))
        self.set_batch_size(self.step * self.times)


def item_counts(dataset: Any) -> np.ndarray:
    """Training interactions of each item id, `[n_items]`.

    Args:
        dataset: a RecBole dataset, best the training split that a model is built with.
    """
    if isinstance(dataset, PositionsDataset) and hasattr(dataset, "_sequence"):
        return dataset.item_counts()
    feat, n_items = dataset.inter_feat, dataset.item_num
    counts = np.bincount(np.asarray(feat[dataset.iid_field]), minlength=n_items)
    length = getattr(dataset, "item_list_length_field", "")
    item_list = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    if (
        length in feat and item_list in feat
    ):  # prefix rows: the first item of a history is no target
        first = _first_targets(np.asarray(feat[dataset.uid_field]), np.asarray(feat[length]))
        counts += np.bincount(np.asarray(feat[item_list])[first, 0], minlength=n_items)
    return counts


def _first_targets(users: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows whose history is a user's very first item: of rows in order of time, a user's first with
    a history of one. (Under a limit of one item every row has such a history.)"""
    short = np.flatnonzero(lengths == 1)
    return short[np.unique(users[short], return_index=True)[1]]
