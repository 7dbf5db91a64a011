"""Training and evaluation rows for sequence models, made on demand from one sorted sequence.

RecBole's own dataset writes every prefix of every history into a matrix before training. This one
keeps the interactions once, sorted by user and time, and rows that point into them; item lists are
gathered for a batch when it is asked for. The evaluation rows are the same as RecBole's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from torch import Tensor

from cprec_recbole.config import CompressionError

NEXT_ITEMS = "next_item_id_list"  # the target at each position of a window, [B, L]; 0 is padding
_START, _END = "_history_start", "_history_end"  # a row's history: sequence[start:end]


class PositionsDataset(SequentialDataset):
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
        index = np.arange(len(users))
        is_first = np.ones(len(users), dtype=bool)
        is_first[1:] = users[1:] != users[:-1]
        first = np.maximum.accumulate(np.where(is_first, index, 0))
        targets = index[~is_first]
        starts = np.maximum(first[targets], targets - self.max_item_list_len)
        rows = self.inter_feat[targets]
        rows.update(self._pointers(starts, targets))
        self.inter_feat = rows

    def build(self) -> list[SequentialDataset]:
        """Split as RecBole does; where every position is trained, training rows become windows."""
        train, *others = super().build()
        if not len(train):
            raise CompressionError(
                "Expected the training split to hold a target with a history before it, but it is "
                "empty; users need at least two interactions, and four to be in every split."
            )
        if self.config["benchmark_filename"] is None:
            train._item_counts = train._count_items()
            if self._windows:
                train.inter_feat = train._into_windows()
        return [train, *others]

    def item_counts(self) -> np.ndarray:
        """Interactions of each item id in this split, `[n_items]`; first items of a history count
        where the split holds its first target."""
        return self._item_counts if hasattr(self, "_item_counts") else self._count_items()

    def targets_per_row(self) -> float:
        """Mean number of predictions that a training row asks for."""
        return float(self.inter_feat[self.item_list_length_field].float().mean())

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        rows = super().__getitem__(index, join)
        if _START not in rows:
            return rows
        starts, ends = rows[_START], rows[_END]
        rows[self.iid_field + self.config["LIST_SUFFIX"]] = self._gather(starts, ends)
        if NEXT_ITEMS in rows:
            rows[NEXT_ITEMS] = self._gather(starts + 1, ends + 1)
        return rows

    def _gather(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Item ids of `sequence[start:end]`, padded on the right, `[B] -> [B, max length]`."""
        index = starts.unsqueeze(-1) + torch.arange(self.max_item_list_len)
        items = self._sequence[index.clamp(max=len(self._sequence) - 1)]
        return items.masked_fill(index >= ends.unsqueeze(-1), 0)

    def _pointers(self, starts: np.ndarray, ends: np.ndarray) -> Interaction:
        return Interaction(
            {
                self.item_list_length_field: torch.from_numpy(ends - starts),
                _START: torch.from_numpy(starts),
                _END: torch.from_numpy(ends),
            }
        )

    def _count_items(self) -> np.ndarray:
        """Targets of the training rows, and the first item of each history that has one."""
        ends = self.inter_feat[_END].numpy()
        first = _first_targets(self.inter_feat, self.uid_field, self.item_list_length_field)
        seen = np.concatenate([ends, ends[first] - 1])
        return np.bincount(self._sequence.numpy()[seen], minlength=self.item_num)

    def _into_windows(self) -> Interaction:
        """Cut each user's training targets into windows, from the newest back: only the oldest
        window of a user is short."""
        rows = self.inter_feat
        ends = rows[_END].numpy()
        order = np.argsort(ends, kind="stable")  # the sequence is sorted by user, then time
        users = rows[self.uid_field].numpy()[order]
        newest = window_rows(users, self.max_item_list_len)
        remaining = np.diff(newest, prepend=-1)
        windows = rows[order[newest]]
        window_ends = ends[order[newest]]
        windows.update(self._pointers(window_ends - remaining, window_ends))
        windows[NEXT_ITEMS] = torch.zeros(len(window_ends), 0, dtype=torch.int64)
        return windows


def window_rows(users: np.ndarray, length: int) -> np.ndarray:
    """The last row of each window, `[n_windows]`, of rows with one target each by user, then time.

    From a user's newest row back, so that only the oldest window of a user is short.
    """
    is_last = np.ones(len(users), dtype=bool)
    is_last[:-1] = users[1:] != users[:-1]
    index = np.arange(len(users))
    newest = np.minimum.accumulate(np.where(is_last, index, len(users))[::-1])[::-1]
    return np.flatnonzero((newest - index) % length == 0)


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
        first = _first_targets(feat, dataset.uid_field, length)
        counts += np.bincount(np.asarray(feat[item_list])[first, 0], minlength=n_items)
    return counts


def _first_targets(rows: Interaction, uid_field: str, length_field: str) -> np.ndarray:
    """Rows whose history is a user's very first item: of rows in order of time, a user's first with
    a history of one. (Under a limit of one item every row has such a history.)"""
    short = np.flatnonzero(np.asarray(rows[length_field]) == 1)
    return short[np.unique(np.asarray(rows[uid_field])[short], return_index=True)[1]]
