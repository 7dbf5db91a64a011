"""The rows of RecBole's sequential data sets and their splits, made on arrays: every split cuts the
rows of each group, such as a user, into consecutive runs, one for each part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from cprec_recbole.config import CompressionError
from cprec_recbole.data.sequences import List, Pointers, SequenceRows, stable_order
from cprec_recbole.data.windows import PositionsDataLoader
from cprec_recbole.host.patching import is_ours, replaces

_NO_TARGETS = (
    "Expected the training split to hold a target with a history before it, but it is empty; "
    "users need at least two interactions, and four to be in every split."
)


@replaces("recbole.data.dataset.SequentialDataset.data_augmentation")
def _data_augmentation(original: Callable, self: Any) -> None:
    # a row for each interaction that has any before it
    self._aug_presets()
    self._check_field("uid_field", "time_field")
    self.sort(by=[self.uid_field, self.time_field], ascending=True)
    feat, longest = self.inter_feat, self.config["MAX_ITEM_LIST_LENGTH"]
    sizes = feat[self.uid_field].unique_consecutive(return_counts=True)[1]
    begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    ends = (torch.arange(len(begins)) > begins).nonzero()[:, 0]
    if not len(ends):
        raise CompressionError(_NO_TARGETS)
    pointers = Pointers(begins[ends], ends, longest)
    columns = {field: column[ends] for field, column in feat.interaction.items()}
    columns[self.item_list_length_field] = (ends - pointers.begins).clamp(max=longest)
    for field, column in feat.interaction.items():
        if field != self.uid_field:
            columns[getattr(self, f"{field}_list_field")] = List(column, pointers)
    self.inter_feat = SequenceRows(columns, pointers)


@replaces("recbole.data.dataset.SequentialDataset.build")
def _build(original: Callable, self: Any) -> list[Any]:
    parts = original(self)
    if not len(parts[0]):
        raise CompressionError(_NO_TARGETS)
    return parts


@replaces("recbole.data.dataset.Dataset.leave_one_out")
def _leave_one_out(
    original: Callable, self: Any, group_by: str | None, leave_one_mode: str
) -> list[Any]:
    # a group keeps a row for training, and what it can spare goes to the test first
    modes = ("valid_and_test", "valid_only", "test_only")
    is_rows = isinstance(self.inter_feat, SequenceRows)
    if group_by is None or not is_rows or leave_one_mode not in modes:
        return original(self, group_by, leave_one_mode)
    rows, sizes = _grouped(self, group_by)
    first, none = np.minimum(sizes - 1, 1), np.zeros_like(sizes)
    second = np.minimum(sizes - 1, 2) - first
    valid, test = ((second, first), (first, none), (none, first))[modes.index(leave_one_mode)]
    return _parts(self, rows, sizes - valid - test, valid, test)


@replaces("recbole.data.dataset.Dataset.split_by_ratio")
def _split_by_ratio(
    original: Callable, self: Any, ratios: list[float], group_by: str | None = None
) -> list[Any]:
    # RecBole's own rule is asked once for each size of a group
    if not isinstance(self.inter_feat, SequenceRows):
        return original(self, ratios, group_by)
    rows, sizes = _grouped(self, group_by)
    shares = [ratio / sum(ratios) for ratio in ratios]
    different, which = np.unique(sizes, return_inverse=True)
    cuts = [[0, *self._calcu_split_ids(size, shares), size] for size in different.tolist()]
    lengths = np.diff(np.array(cuts, dtype=np.int64).reshape(-1, len(shares) + 1))
    return _parts(self, rows, *lengths[which].T)


@replaces("recbole.data.dataset.Dataset.time_based_split")
def _time_based_split(
    original: Callable, self: Any, ratios: list[float], group_by: str | None
) -> list[Any]:
    # what is later than the boundary of all groups is the test; a share of the rest, training
    times = np.asarray(self.inter_feat.interaction.get(self.time_field, []))
    is_grouped = group_by is not None and isinstance(self.inter_feat, SequenceRows)
    if not is_grouped or len(ratios) != 3 or not len(times) or (np.diff(times) < 0).any():
        return original(self, ratios, group_by)
    train, _, test = (ratio / sum(ratios) for ratio in ratios)
    is_early = times <= np.percentile(times, 100 * (1 - test))
    rows, sizes = _grouped(self, group_by)
    n_early = np.append(0, np.cumsum(is_early[rows]))[np.cumsum(sizes)]
    early = np.diff(n_early, prepend=0)
    first = np.minimum((early * (train / (1 - test))).astype(np.int64), early)
    return _parts(self, rows, first, early - first, sizes - early)


def _grouped(dataset: Any, group_by: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers by group, as groups appear, `[n]`, and rows of each group, `[n_groups]`; without
    a field all rows are one group."""
    if group_by is None:
        return np.arange(len(dataset)), np.array([len(dataset)])
    codes, values = pd.factorize(dataset.inter_feat[group_by].numpy())
    return stable_order(codes.astype(np.int32)), np.bincount(codes, minlength=len(values))


def _parts(dataset: Any, rows: np.ndarray, *lengths: np.ndarray) -> list[Any]:
    """A data set for each part, out of rows by group and the lengths of each part's runs."""
    n_parts, n_groups = len(lengths), len(lengths[0])
    runs = np.stack(lengths, axis=1).ravel()
    part_of = np.tile(np.arange(n_parts, dtype=np.int16), n_groups).repeat(runs)
    parts = [rows[part_of == part] for part in range(n_parts)]
    dataset._drop_unused_col()
    return [dataset.copy(dataset.inter_feat.take(part)) for part in parts]


@replaces("recbole.data.utils.get_dataloader")
def _get_dataloader(original: Callable, config: Any, phase: str) -> type:
    if phase == "train" and is_ours(config) and config["training"] == "all_positions":
        return PositionsDataLoader
    return original(config, phase)
