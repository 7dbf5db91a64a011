"""What a study found, out of its folder alone: a line for each contender and ratio in a cell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from cprec_recbole.compare.page.summary import OURS, subject_of
from cprec_recbole.compare.statistics import Difference, paired_difference
from cprec_recbole.compare.study.spec import UNCOMPRESSED
from cprec_recbole.compare.study.store import read_runs, read_users

Run = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One contender at one ratio in one cell, over its seeds.

    Attributes:
        contender: its name.
        ratio: what was aimed at; None for no such aim.
        seeds: of the finished runs.
        parameters: mean over seeds.
        smaller: bytes of the uncompressed model over its own; None without that model.
        test: NDCG@20 on test for each seed.
        to_uncompressed: difference over users, of the seeds that both have; None for none.
        to_subject: the same to `Summary.subject` at the same ratio.
        base: NDCG@20 of the uncompressed model on test, over those seeds; None for none.
    """

    contender: str
    ratio: float | None
    seeds: tuple[int, ...]
    parameters: float
    smaller: float | None
    test: tuple[float, ...]
    to_uncompressed: Difference | None
    to_subject: Difference | None
    base: float | None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for one."""
        return stdev(self.test) if len(self.test) > 1 else None

    @property
    def share(self) -> tuple[float, float, float] | None:
        """Its NDCG@20 by the uncompressed model's, and the interval of that; None where there is
        nothing to divide by."""
        found = self.to_uncompressed
        if found is None or not self.base:
            return None
        return 1 + found.mean / self.base, 1 + found.low / self.base, 1 + found.high / self.base


@dataclass(frozen=True)
class CellSummary:
    """A model on a data set: its lines, the uncompressed model first."""

    dataset: str
    model: str
    length: int
    users: int
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Summary:
    """A study summed up.

    Attributes:
        runs: all runs that finished.
        failed: those that did not.
        cells: in the order of data sets and models.
        subject: the contender that others are measured against beside the uncompressed model;
            None where nothing else was run.
    """

    runs: tuple[Run, ...]
    failed: tuple[Run, ...]
    cells: tuple[CellSummary, ...]
    subject: str | None

    @property
    def is_searched(self) -> bool:
        """Whether a learning rate was chosen out of several."""
        return any(len(run["search"]) > 1 for run in self.runs)

    @property
    def trainings(self) -> int:
        """Trainings in all: runs that were trained, and what the search of learning rates took
        beside them. Of runs that came to the same training, each counts."""
        trained = [run for run in self.runs if run["epochs"]]
        searches = {_place(run) + _who(run): len(run["search"]) for run in trained}
        return len(trained) + sum(max(0, n - 1) for n in searches.values())

    @property
    def edges(self) -> tuple[int, int, int]:
        """Of how many searches of learning rates the highest rate was the best, the lowest, and how
        many searches there were."""
        searches = {_place(run) + _who(run): run["search"] for run in self.runs}
        won = []
        for search in searches.values():
            ended = {t["learning_rate"]: t["valid"] for t in search if t["valid"] is not None}
            if len(search) > 1 and ended:  # one rate is no search
                best = max(ended, key=lambda rate: ended[rate])
                rates = [trial["learning_rate"] for trial in search]
                won.append((best == max(rates), best == min(rates)))
        return sum(high for high, _ in won), sum(low for _, low in won), len(won)


def summarise(folder: Path, against: str | None = None) -> Summary:
    """Sum up the runs in the folder of a study.

    Args:
        folder: of a study.
        against: the contender that others are measured against; None: of ours the one that was
            run most often.

    Raises:
        CompressionError: no runs, files that do not belong together, or no run of `against`.
    """
    records = read_runs(folder)
    runs = [run for run in records if "error" not in run]
    places = dict.fromkeys(_place(run) for run in runs)
    points = dict.fromkeys(_place(run) + _who(run) for run in runs)
    subject = subject_of((contender for *_, contender, _ in points), against)
    of_cells = [[run for run in runs if _place(run) == place] for place in places]
    cells = tuple(_cell(folder, of_cell, subject) for of_cell in of_cells)
    return Summary(tuple(runs), tuple(r for r in records if "error" in r), cells, subject)


def _cell(folder: Path, runs: list[Run], subject: str | None) -> CellSummary:
    users = {run["key"]: read_users(folder, run["key"]) for run in runs}
    groups: dict[tuple[str, float | None], dict[int, Run]] = {}
    for run in runs:
        groups.setdefault(_who(run), {})[run["seed"]] = run
    plain = groups.get((UNCOMPRESSED, None))
    lines = []
    for (contender, ratio), own in groups.items():
        rival = None if subject in (None, contender) else groups.get((str(subject), ratio))
        seeds = sorted(own)
        lines.append(
            Line(
                contender=contender,
                ratio=ratio,
                seeds=tuple(seeds),
                parameters=mean(own[seed]["total_parameters"] for seed in seeds),
                smaller=_bytes(plain.values()) / _bytes(own.values()) if plain else None,
                test=tuple(own[seed]["test"]["ndcg@20"] for seed in seeds),
                to_uncompressed=None if own is plain else _difference(own, plain, users),
                to_subject=_difference(own, rival, users),
                base=_quality(plain, set(own)),
            )
        )
    lines.sort(key=_order)
    first = runs[0]
    n_users = len(next(iter(users.values())))
    return CellSummary(first["dataset"], first["model"], first["length"], n_users, tuple(lines))


def _difference(
    own: dict[int, Run], other: dict[int, Run] | None, users: dict[str, np.ndarray]
) -> Difference | None:
    """Over the users, of the seeds that both have."""
    common = sorted(set(own) & set(other or {}))
    if other is None or not common:
        return None
    return paired_difference(
        [users[own[seed]["key"]] for seed in common],
        [users[other[seed]["key"]] for seed in common],
    )


def _quality(plain: dict[int, Run] | None, seeds: set[int]) -> float | None:
    found = [run["test"]["ndcg@20"] for seed, run in (plain or {}).items() if seed in seeds]
    return mean(found) if found else None


def _bytes(runs: Iterable[Run]) -> float:
    return mean(run["bytes"] for run in runs)


def _place(run: Run) -> tuple[Any, ...]:
    return run["dataset"], run["model"], run["length"]


def _who(run: Run) -> tuple[str, float | None]:
    return run["contender"], run["ratio"]


def _order(line: Line) -> tuple[Any, ...]:
    """The uncompressed model, what has no ratio, then ratio by ratio ours before the controls."""
    known = [UNCOMPRESSED, *OURS]
    place = known.index(line.contender) if line.contender in known else len(known)
    return line.contender != UNCOMPRESSED, line.ratio or 0.0, place, line.contender
