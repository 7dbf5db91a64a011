"""Intervals of differences over users, for every point of a study."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cprec_recbole.compare.findings.points import Cell, Point
from cprec_recbole.compare.findings.runs import StudyRun
from cprec_recbole.compare.statistics import Difference, paired_difference
from cprec_recbole.config import CompressionError

Users = dict[Path, np.ndarray]  # of each run's file


def add_intervals(cells: Iterable[Cell], subject: str | None) -> None:
    """Give each point the intervals of its differences to the uncompressed model of its cell and to
    the subject of the findings, at the same ratio or where that has none; and each cell its users.

    Points are left without where a run has no `<key>.npy` beside it or no seed is common.

    Raises:
        CompressionError: such a file that cannot be read or does not match the others; it is named.
    """
    for cell in cells:
        users = _users_of(cell)
        cell.users = len(next(iter(users.values()))) if users else None
        for point in cell.points:
            if cell.reference is not None and point is not cell.reference:
                point.interval = _interval(point, cell.reference, users)
            rival = cell.rival(subject, point)
            if rival is not None:
                point.to_subject = _interval(point, rival, users)


def _interval(point: Point, other: Point, users: Users) -> Difference | None:
    """Of the seeds that both have; None where there is none, or the users of a run are missing."""
    theirs = {run.seed: run for run in other.runs}
    pairs = [(run, theirs[run.seed]) for run in point.runs if run.seed in theirs]
    if not pairs or any(run.path not in users for pair in pairs for run in pair):
        return None
    return paired_difference(
        [users[run.path] for run, _ in pairs], [users[run.path] for _, run in pairs]
    )


def _users_of(cell: Cell) -> Users:
    """NDCG@20 of each test user of each run, `[users]`, as far as it lies beside the runs."""
    found: Users = {}
    for run in (run for point in cell.points for run in point.runs):
        values = _read(run)
        if values is None:
            continue
        first = next(iter(found.values()), values)
        if len(values) != len(first):
            raise _refusal(run, f"{len(first)} test users, as for the other runs", str(len(values)))
        found[run.path] = values
    return found


def _read(run: StudyRun) -> np.ndarray | None:
    if not run.users_path.exists():
        return None
    try:
        return load_users(run.users_path)
    except ValueError as error:
        raise _refusal(run, "a number for each test user", str(error)) from None


def load_users(path: Path) -> np.ndarray:
    """NDCG@20 of each test user, `[users]`; a ValueError where the file does not hold that."""
    try:
        values = np.load(path, allow_pickle=False)
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise ValueError(f"an array {list(values.shape)} that has to be finite")
    except (OSError, TypeError, AttributeError, EOFError) as error:
        raise ValueError(str(error)) from None
    return values


def _refusal(run: StudyRun, expected: str, got: str) -> CompressionError:
    return CompressionError(
        f"Expected {run.users_path} to hold {expected}, but got {got}; remove {run.path.name} "
        "beside it and repeat the run."
    )
