"""RecBole's ways to split interactions, on arrays of row numbers instead of lists of Python ints.

Every way cuts the rows of each group, such as a user, into consecutive runs, one for each part.
Their lengths are a table `[n_groups, n_parts]`. Each function takes a method of RecBole's `Dataset`
and gives what stands in its place for the rows of a sequential data set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from cprec_recbole.data.interactions import stable_order
from cprec_recbole.data.sequences import SequenceRows


def by_leaving_out(original: Callable) -> Callable:
    """RecBole's `leave_one_out`: a group keeps a row for training, and what it can spare goes to
    the test first."""

    def leave_one_out(self: Any, group_by: str | None, leave_one_mode: str) -> list[Any]:
        modes = ("valid_and_test", "valid_only", "test_only")
        if not _has_groups(self, group_by) or leave_one_mode not in modes:
            return original(self, group_by, leave_one_mode)
        rows, sizes = _grouped(self, group_by)
        lengths = np.zeros((len(sizes), 3), dtype=np.int64)
        last = 1 if leave_one_mode == "valid_only" else 2
        lengths[:, last] = np.minimum(sizes - 1, 1)
        if leave_one_mode == "valid_and_test":
            lengths[:, 1] = np.minimum(sizes - 1, 2) - lengths[:, 2]
        lengths[:, 0] = sizes - lengths.sum(1)
        return _parts(self, rows, lengths)

    return leave_one_out


def by_ratios(original: Callable) -> Callable:
    """RecBole's `split_by_ratio`, whose own rule is asked once for each size of a group."""

    def split_by_ratio(self: Any, ratios: list[float], group_by: str | None = None) -> list[Any]:
        if not isinstance(self.inter_feat, SequenceRows):
            return original(self, ratios, group_by)
        rows, sizes = _grouped(self, group_by)
        shares = [ratio / sum(ratios) for ratio in ratios]
        different, which = np.unique(sizes, return_inverse=True)
        cuts = [[0, *self._calcu_split_ids(size, shares), size] for size in different.tolist()]
        lengths = np.diff(np.array(cuts, dtype=np.int64).reshape(-1, len(shares) + 1))
        return _parts(self, rows, lengths[which])

    return split_by_ratio


def by_time(original: Callable) -> Callable:
    """RecBole's `time_based_split`, where the rows are in order of time: what is later than the
    boundary of all groups is the test, and a share of a group's other rows for training."""

    def time_based_split(self: Any, ratios: list[float], group_by: str | None) -> list[Any]:
        feat, n_parts = self.inter_feat, len(ratios)
        if not _has_groups(self, group_by) or self.time_field not in feat or n_parts != 3:
            return original(self, ratios, group_by)
        times = feat[self.time_field].numpy()
        if (np.diff(times) < 0).any():
            return original(self, ratios, group_by)
        train, _, test = (ratio / sum(ratios) for ratio in ratios)
        is_early = times <= np.percentile(times, 100 * (1 - test))
        rows, sizes = _grouped(self, group_by)
        n_early = np.append(0, np.cumsum(is_early[rows]))[np.cumsum(sizes)]
        early = np.diff(n_early, prepend=0)
        first = np.minimum((early * (train / (1 - test))).astype(np.int64), early)
        return _parts(self, rows, np.stack([first, early - first, sizes - early], axis=1))

    return time_based_split


def _has_groups(dataset: Any, group_by: str | None) -> bool:
    return group_by is not None and isinstance(dataset.inter_feat, SequenceRows)


def _grouped(dataset: Any, group_by: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers by group, the group that appears first before the others, `[n]`, and how many
    rows each group has, `[n_groups]`; without a field all rows are one group."""
    if group_by is None:
        return np.arange(len(dataset)), np.array([len(dataset)])
    codes, values = pd.factorize(dataset.inter_feat[group_by].numpy())
    return stable_order(codes.astype(np.int32)), np.bincount(codes, minlength=len(values))


def _parts(dataset: Any, rows: np.ndarray, lengths: np.ndarray) -> list[Any]:
    """A data set for each part, out of rows by group and the lengths of the runs."""
    n_groups, n_parts = lengths.shape
    part_of = np.tile(np.arange(n_parts, dtype=np.int16), n_groups).repeat(lengths.ravel())
    parts = [rows[part_of == part] for part in range(n_parts)]
    dataset._drop_unused_col()
    return [dataset.copy(dataset.inter_feat.take(part)) for part in parts]
