"""Windows over users' histories: the papers' objective, a prediction at every position."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.data.sequences import Pointers, SequenceRows, gather, no_targets
from cprec_recbole.data.splits import stable_order


class Windows(NamedTuple):
    """Windows that hold each target of some rows once.

    From a user's newest target back, so that only the oldest window of a user is short.

    Attributes:
        rows: the row of a window's newest target, `[n_windows]`.
        ends: that target's place in the sequence, `[n_windows]`.
        lengths: positions of a window, `[n_windows]`.
        is_target: whether a place of the sequence is a target, `[n_interactions]`.
    """

    rows: Tensor
    ends: Tensor
    lengths: Tensor
    is_target: Tensor

    @classmethod
    def of(cls, pointers: Pointers, length: int) -> Windows:
        """Cut the targets of rows into windows.

        Args:
            pointers: of the rows, in any order and with any left out.
            length: positions of a window at most.
        """
        order = stable_order(pointers.ends.numpy())  # by user, then time
        targets, begins = pointers.ends.numpy()[order], pointers.begins.numpy()[order]
        is_last = np.ones(len(order), dtype=bool)
        is_last[:-1] = begins[1:] != begins[:-1]
        lasts = np.flatnonzero(is_last)
        newest, oldest = targets[lasts], targets[np.append(0, lasts[:-1] + 1)]
        n_windows = -(-(newest - oldest + 1) // length)
        n_newer = np.repeat(np.cumsum(n_windows), n_windows) - np.arange(1, n_windows.sum() + 1)
        ends = np.repeat(newest, n_windows) - n_newer * length
        firsts = np.maximum(ends - length + 1, np.repeat(oldest, n_windows))
        nearest = np.searchsorted(targets, ends, side="right") - 1
        ends = targets[nearest]  # where rows were left out, a window ends with one that is there
        here = ends >= firsts
        n_interactions = len(next(iter(pointers.lists.values())))
        is_target = torch.zeros(n_interactions, dtype=torch.bool)
        is_target[pointers.ends] = True
        found = (order[nearest], ends, ends - firsts + 1)
        rows, ends, lengths = (torch.from_numpy(each[here]) for each in found)
        return cls(rows, ends, lengths, is_target)

    @property
    def n_targets(self) -> int:
        """Predictions that all windows ask for."""
        return int(self.is_target.sum())

    def gather(self, items: Tensor, index: Any, length: int) -> tuple[Tensor, Tensor]:
        """What windows read and what is to be predicted at each position, `[n, length]` twice.

        Args:
            items: the item ids of the sequence, `[n_interactions]`.
            index: which windows.
            length: columns; 0 behind a window, and where there is no target.
        """
        ends = self.ends[index]
        starts = ends - self.lengths[index]
        targets = gather(items, starts + 1, ends + 1, length)
        asked = gather(self.is_target, starts + 1, ends + 1, length)
        return gather(items, starts, ends, length), targets.masked_fill(~asked, 0)


class PositionsDataLoader(TrainDataLoader):
    """RecBole's TrainDataLoader of windows, for `training: all_positions`.

    `train_batch_size` counts predictions, as everywhere else: a window asks for many, and 2,048
    windows a step would make one step an epoch.

    Raises:
        CompressionError: rows that do not tell where they lie in a user's history.
    """

    step: int

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        self._items = dataset.iid_field + config["LIST_SUFFIX"]
        if not self._are_sequences(dataset):
            raise _no_sequences()
        feat = dataset.inter_feat
        if not len(feat):
            raise no_targets()
        self._feat = feat.take(slice(None))  # in the order of now
        self._windows = Windows.of(feat.pointers, dataset.max_item_list_len)
        if self._windows.n_targets != len(feat):  # some are there twice
            raise _no_sequences()
        super().__init__(config, dataset, sampler, shuffle=shuffle)

    def _are_sequences(self, dataset: Any) -> bool:
        """Whether rows are still what the interactions have at their places."""
        feat, item = dataset.inter_feat, dataset.iid_field
        if not isinstance(feat, SequenceRows):
            return False
        kept = feat.interaction.kept()
        if self._items not in kept or kept[self._items] is not None or item not in kept:
            return False
        return torch.equal(feat.pointers.lists[self._items][feat.pointers.ends], feat[item])

    def _init_batch_size_and_step(self) -> None:
        super()._init_batch_size_and_step()
        self.sample_size = len(self._windows.ends)
        self.step = max(1, round(self.step * self.sample_size / self._windows.n_targets))
        self.set_batch_size(self.step * self.times)

    def collate_fn(self, index: list[int]) -> Interaction:
        """A batch of windows: RecBole's columns of their newest targets, and the next items."""
        dataset, feat, rows = self._dataset, self._feat, self._windows.rows[index]
        kept = feat.interaction.kept()
        columns = {name: column[rows] for name, column in kept.items() if column is not None}
        columns[dataset.item_list_length_field] = self._windows.lengths[index]
        items = feat.pointers.lists[self._items]
        length = dataset.max_item_list_len
        columns[self._items], columns[NEXT_ITEMS] = self._windows.gather(items, index, length)
        batch = dataset.join(Interaction(columns))
        return self._neg_sampling(self.transform(dataset, batch))


def _no_sequences() -> CompressionError:
    return CompressionError(
        "Expected `training` to be last_position with rows that hold prefixes and not sequences, "
        "as `benchmark_filename` has, and data sets with a `data_augmentation` of their own or "
        "whose items, lists or rows were changed, but got all_positions."
    )
