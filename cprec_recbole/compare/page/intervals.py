"""Intervals of differences over users, by the function that the caller brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from cprec_recbole.compare.page.points import Cell, Interval, Point
from cprec_recbole.compare.page.runs import StudyRun
from cprec_recbole.config import CompressionError

# From values of the same users [n_users] for a contender and for another one, an array for each
# seed that both have.
PairedInterval = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], Interval]


def add_intervals(cells: Iterable[Cell], paired: PairedInterval, subject: str | None) -> None:
    """Give each point the intervals of its differences to the uncompressed model of its cell and,
    at the same ratio, to the subject of the findings.

    Points are left without where a run has no `<key>.npy` beside it or no seed is common.

    Raises:
        CompressionError: such a file that cannot be read or does not match its pair; it is named.
    """
    for cell in cells:
        for point in cell.points:
            if cell.reference is not None and point is not cell.reference:
                point.interval = _interval(point, cell.reference, paired)
            rival = None if subject is None else cell.find(subject, point.ratio)
            if rival is not None and rival.contender != point.contender:
                point.to_subject = _interval(point, rival, paired)


def _interval(point: Point, reference: Point, paired: PairedInterval) -> Interval | None:
    base = {run.seed: run for run in reference.runs}
    ours, theirs = [], []
    for run in point.runs:
        if run.seed not in base:
            continue
        own, other = _users(run), _users(base[run.seed])
        if own is None or other is None:
            return None
        _check_pair(own, other, run)
        ours.append(own)
        theirs.append(other)
    return paired(ours, theirs) if ours else None


def _users(run: StudyRun) -> np.ndarray | None:
    """NDCG@20 of each test user [n_users], where it lies beside the run."""
    path = _users_file(run)
    if not path.exists():
        return None
    try:
        values = np.load(path, allow_pickle=False)
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"an array {list(values.shape)}")
    except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
        raise CompressionError(
            f"Expected {path} to hold a number for each test user, but got {error}; repeat the run."
        ) from None
    return values


def _users_file(run: StudyRun) -> Path:
    return run.path.with_suffix(".npy")


def _check_pair(own: np.ndarray, other: np.ndarray, run: StudyRun) -> None:
    if own.shape != other.shape:
        raise CompressionError(
            f"Expected {_users_file(run)} to hold {len(other)} test users, as for the other "
            f"contenders, but got {len(own)}; repeat the run."
        )
