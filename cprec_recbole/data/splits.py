"""RecBole's ways to split interactions, as arrays of row numbers instead of lists of Python ints.

Every way cuts the rows of each group into consecutive runs, one for each part. How long the runs
are is a table `[n_groups, n_parts]`; what each part holds follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch


@dataclass(frozen=True)
class Groups:
    """Rows by group, the group that appears first before the others.

    Attributes:
        rows: row numbers, group after group, each in the order it had, `[n]`.
        sizes: rows of each group, `[n_groups]`.
    """

    rows: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Groups:
        """Rows with the same value, `[n]`, are a group."""
        codes, values = pd.factorize(values)
        sizes = np.bincount(codes, minlength=len(values))
        return cls(stable_order(codes.astype(np.int32)), sizes)

    def cut(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The rows of each part, from the lengths of the runs, `[n_groups, n_parts]`."""
        n_groups, n_parts = lengths.shape
        parts = np.repeat(np.tile(np.arange(n_parts, dtype=np.int16), n_groups), lengths.ravel())
        return [self.rows[parts == part] for part in range(n_parts)]


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Row numbers by key, equal keys in the order they had, `[n]`. PyTorch sorts whole numbers by
    their digits, NumPy compares them: at ten million a quarter of the time."""
    keys = np.require(keys, requirements="W")  # of pandas they may be read-only: torch warns
    return torch.from_numpy(keys).argsort(stable=True).numpy()


def leave_one_out(sizes: np.ndarray, mode: str) -> np.ndarray | None:
    """Run lengths that leave a group's last rows out for validation and test, `[n_groups, 3]`.

    A group keeps at least one row for training, and what it can spare goes to the test first. None
    for a mode that RecBole does not know.
    """
    spare = sizes - 1
    last = np.minimum(spare, 1)
    second = np.minimum(spare, 2) - last
    none = np.zeros_like(sizes)
    held_out = {
        "valid_and_test": (second, last),
        "valid_only": (last, none),
        "test_only": (none, last),
    }.get(mode)
    if held_out is None:
        return None
    return np.stack([sizes - held_out[0] - held_out[1], *held_out], axis=1)


def by_ratio(sizes: np.ndarray, cuts_of: Callable[[int], Sequence[int]]) -> np.ndarray:
    """Run lengths by RecBole's own rule, asked once for each size, `[n_groups, n_parts]`.

    Args:
        sizes: rows of each group, `[n_groups]`.
        cuts_of: where a group of a size is cut, one number less than there are parts.
    """
    if not len(sizes):
        return np.zeros((0, len(cuts_of(0)) + 1), dtype=np.int64)
    different, which = np.unique(sizes, return_inverse=True)
    lengths = [np.diff([0, *cuts_of(size), size]) for size in different.tolist()]
    return np.stack(lengths)[which]


def by_time(groups: Groups, is_early: np.ndarray, share: float) -> np.ndarray:
    """Run lengths of training, validation and test, `[n_groups, 3]`.

    Args:
        groups: rows by group, each in order of time.
        is_early: whether a row is from before the test period, `[n]`.
        share: of a group's early rows, for training.
    """
    seen = np.append(0, np.cumsum(is_early[groups.rows]))[np.cumsum(groups.sizes)]
    early = np.diff(seen, prepend=0)
    train = np.minimum((early * share).astype(np.int64), early)
    return np.stack([train, early - train, groups.sizes - early], axis=1)
