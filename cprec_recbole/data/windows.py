"""Windows over users' histories: the papers' objective, a prediction at every position."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.data import NEXT_ITEMS
from cprec_recbole.data.sequences import Pointers, SequenceRows, gather, stable_order


class Windows(NamedTuple):
    """Windows that hold each target of some rows once; only a user's oldest one is short."""

    rows: Tensor  # the row of a window's newest target, [n_windows]
    ends: Tensor  # that target's place in the sequence, [n_windows]
    lengths: Tensor  # positions of a window, [n_windows]
    is_target: Tensor  # whether a place of the sequence is a target, [n_interactions]

    @classmethod
    def of(cls, pointers: Pointers, n_interactions: int, length: int) -> Windows:
        """Cut the targets of rows, in any order, into windows of `length` positions at most; the
        rows point into `n_interactions` places."""
        order = torch.from_numpy(stable_order(pointers.ends.numpy()))  # by user, then time
        targets, begins = pointers.ends[order], pointers.begins[order]
        counts = begins.unique_consecutive(return_counts=True)[1]
        behind = targets[counts.cumsum(0) - 1].repeat_interleave(counts)
        behind -= targets  # places between a target and its user's newest
        n_newer = behind // length  # windows of the user that are newer
        is_last = torch.ones(len(order), dtype=torch.bool)
        is_last[:-1] = (begins[1:] != begins[:-1]) | (n_newer[1:] != n_newer[:-1])
        ends = targets[is_last]
        starts = torch.maximum(ends + behind[is_last] % length - length, begins[is_last])
        is_target = torch.zeros(n_interactions, dtype=torch.bool)
        is_target[pointers.ends] = True
        return cls(order[is_last], ends, ends - starts, is_target)

    @property
    def n_targets(self) -> int:
        """Predictions that all windows ask for."""
        return int(self.is_target.sum())

    def gather(self, items: Tensor, index: Any, length: int) -> tuple[Tensor, Tensor]:
        """What some windows read and what comes next at each position, `[n, length]` twice; 0
        behind a window, and where there is no target. `items` has the id at each place."""
        ends = self.ends[index]
        starts = ends - self.lengths[index]
        targets = gather(items, starts + 1, ends + 1, length)
        asked = gather(self.is_target, starts + 1, ends + 1, length)
        return gather(items, starts, ends, length), targets.masked_fill(~asked, 0)


class PositionsDataLoader(TrainDataLoader):
    """RecBole's TrainDataLoader of windows, for `training: all_positions`; `train_batch_size`
    counts predictions. A CompressionError for rows that do not tell where they lie in a history."""

    step: int

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        self._name = dataset.iid_field + config["LIST_SUFFIX"]
        feat = dataset.inter_feat
        lists = feat.lists() if isinstance(feat, SequenceRows) else {}
        windows = None
        if self._name in lists and dataset.iid_field in feat:
            self._items = lists[self._name]
            # rows must still be what the interactions have at their places
            if torch.equal(self._items[feat.pointers.ends], feat[dataset.iid_field]):
                windows = Windows.of(feat.pointers, len(self._items), dataset.max_item_list_len)
        if windows is None or windows.n_targets != len(feat):  # some are there twice
            raise CompressionError(
                "Expected `training` to be last_position with rows that hold prefixes and not "
                "sequences, as `benchmark_filename` has, and data sets with a `data_augmentation` "
                "of their own or whose items, lists or rows were changed, but got all_positions."
            )
        self._columns = {name: feat[name] for name in feat if name not in lists}
        self._windows = windows
        super().__init__(config, dataset, sampler, shuffle=shuffle)

    def _init_batch_size_and_step(self) -> None:
        super()._init_batch_size_and_step()
        self.sample_size = len(self._windows.ends)
        self.step = max(1, round(self.step * self.sample_size / self._windows.n_targets))
        self.set_batch_size(self.step * self.times)

    def collate_fn(self, index: list[int]) -> Interaction:
        """A batch of windows: RecBole's columns of their newest targets, and the next items."""
        dataset, rows = self._dataset, self._windows.rows[index]
        columns = {name: column[rows] for name, column in self._columns.items()}
        lengths = self._windows.lengths[index]
        columns[dataset.item_list_length_field] = lengths
        # no wider than the longest: what follows is padding, and no position sees it
        items, targets = self._windows.gather(self._items, index, int(lengths.max()))
        columns |= {self._name: items, NEXT_ITEMS: targets}
        batch = dataset.join(Interaction(columns))
        return self._neg_sampling(self.transform(dataset, batch))
