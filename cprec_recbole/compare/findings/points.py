"""Runs put together: the seeds of a contender to a point, a model's points on data to a cell."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean, stdev

from cprec_recbole.compare.findings.runs import StudyRun, Trial
from cprec_recbole.compare.results import QUALITY, UNCOMPRESSED, Figure
from cprec_recbole.compare.statistics import Difference

Quantity = Callable[[StudyRun], float | None]

# contenders in the order in which legends and tables show them; others follow by name
ORDER = (
    *(UNCOMPRESSED, "compressed", "recovered", "recovered-int8", "uncompressed-recovered"),
    *("tree", "untied", "blocks-only", "sharing-only", "narrower", "narrower-int8", "one-rank"),
    *("recjpq-svd", "recjpq-random", "hashing", "uniform-svd", "int8"),
)


@dataclass
class Point:
    """One contender at one ratio in a cell: its runs, a seed each."""

    contender: str
    ratio: float | None
    runs: list[StudyRun]
    remark: str = ""
    interval: Difference | None = None  # to the uncompressed model
    to_subject: Difference | None = None  # and to the subject of the findings, at the same ratio

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        ratio = "" if self.ratio is None else f" ÷\u00a0{self.ratio:g}"
        return f"{self.contender}{ratio}{self.remark}"

    @property
    def seeds(self) -> list[int | None]:
        """The seeds of its runs."""
        return [run.seed for run in self.runs]

    @property
    def search(self) -> tuple[Trial, ...]:
        """The learning rates that were tried, with the first seed."""
        return min(self.runs, key=lambda run: run.seed or 0).search

    @property
    def rates(self) -> set[float]:
        """The same, as a set."""
        return {trial.learning_rate for trial in self.search}

    def figure(self, quantity: Quantity) -> Figure | None:
        """Mean and spread (NaN for one seed) over the runs in which this was measured."""
        values = [v for run in self.runs if (v := quantity(run)) is not None]
        return _summed_up(values) if values else None

    @cached_property
    def quality(self) -> Figure:
        """NDCG@20 on the test set."""
        return _summed_up([run.test[QUALITY] for run in self.runs])

    @cached_property
    def parameters(self) -> float:
        """All parameters."""
        return mean(run.parameters for run in self.runs)

    @cached_property
    def size(self) -> float:
        """Bytes of the weights; where a study does not tell them, those of float32."""
        known = self.figure(lambda run: run.bytes)
        return 4 * self.parameters if known is None else known.mean


@dataclass
class Cell:
    """One model on one data set at one length of history."""

    dataset: str
    model: str
    length: int | None
    points: list[Point] = field(default_factory=list)
    users: int | None = None  # test users, where their figures lie beside the runs

    @property
    def label(self) -> str:
        """What the text calls it."""
        length = "" if self.length is None else f", length {self.length}"
        return f"{self.model} on {self.dataset}{length}"

    @cached_property
    def reference(self) -> Point | None:
        """The uncompressed model."""
        return next((p for p in self.points if p.contender == UNCOMPRESSED), None)

    @property
    def ratios(self) -> list[float]:
        """Ratios that were aimed at, from the least on."""
        return sorted({p.ratio for p in self.points if p.ratio is not None})

    def at(self, ratio: float | None) -> list[Point]:
        """The points of one ratio and those without any."""
        return [p for p in self.points if p.ratio is None or p.ratio == ratio]

    def find(self, contender: str, ratio: float | None) -> Point | None:
        """A contender's point at a ratio, the first where options make several."""
        found = [p for p in self.points if (p.contender, p.ratio) == (contender, ratio)]
        return found[0] if found else None

    def rival(self, subject: str | None, point: Point) -> Point | None:
        """The subject at a point's ratio, or where it has none; None for the subject's own."""
        if subject is None or subject == point.contender:
            return None
        return self.find(subject, point.ratio) or self.find(subject, None)


def in_order(contenders: Iterable[str]) -> list[str]:
    """Each name once, in the order in which legends and tables show them."""
    names = set(contenders)
    return [*(name for name in ORDER if name in names), *sorted(names - set(ORDER))]


def make_cells(runs: Iterable[StudyRun]) -> list[Cell]:
    """All finished runs by cell and point, contenders in the order of the legend."""
    finished = [run for run in runs if run.error is None]
    order = {name: i for i, name in enumerate(in_order(run.contender for run in finished))}
    cells: dict[tuple[str, str, int], Cell] = {}
    points: dict[tuple[object, ...], Point] = {}
    finished.sort(key=lambda r: (order[r.contender], r.ratio or 0, _options(r), r.seed or 0))
    for run in finished:
        place = (run.dataset, run.model, run.length or 0)
        cell = cells.setdefault(place, Cell(run.dataset, run.model, run.length))
        key = (*place, run.contender, run.ratio, _options(run))
        if key not in points:
            points[key] = Point(run.contender, run.ratio, [])
            cell.points.append(points[key])
        points[key].runs.append(run)
    for cell in cells.values():
        _tell_apart(cell.points)
    return [cells[place] for place in sorted(cells)]


def pareto_front(points: Iterable[Point], size: Quantity) -> list[tuple[float, float]]:
    """(size, NDCG@20) of the points that no smaller or equally small one beats, by size."""
    placed = [
        (figure.mean, point.quality.mean)
        for point in points
        if (figure := point.figure(size)) is not None
    ]
    front: list[tuple[float, float]] = []
    for place in sorted(placed, key=lambda p: (p[0], -p[1])):
        if not front or place[1] > front[-1][1]:
            front.append(place)
    return front


def gaps(cells: Sequence[Cell]) -> list[tuple[Cell, list[str]]]:
    """What other cells have and this one lacks: contenders at a ratio, and seeds of them."""
    wanted: Counter[tuple[str, float | None]] = Counter()
    for cell in cells:
        for point in cell.points:
            known = wanted[point.contender, point.ratio]
            wanted[point.contender, point.ratio] = max(known, len(set(point.seeds)))
    found = []
    for cell in cells:
        lacks = [
            lack
            for (name, ratio), seeds in wanted.items()
            if (lack := _lack(cell, name, ratio, seeds))
        ]
        if lacks:
            found.append((cell, lacks))
    return found


def _lack(cell: Cell, contender: str, ratio: float | None, seeds: int) -> str | None:
    point = cell.find(contender, ratio)
    if point is None:
        return Point(contender, ratio, []).label
    have = len(set(point.seeds))
    return None if have == seeds else f"{point.label} ({have} of {seeds} seeds)"


def _summed_up(values: Sequence[float]) -> Figure:
    return Figure(mean(values), stdev(values) if len(values) > 1 else math.nan)


def _options(run: StudyRun) -> str:
    """What makes two runs of a contender different points; seeds and learning rates do not."""
    same = ("seed", "learning_rate")
    chosen = {k: v for k, v in run.options.items() if k not in same}
    return json.dumps(chosen, sort_keys=True, default=str)


def _tell_apart(points: list[Point]) -> None:
    """Points of one contender and ratio are called by the options in which they differ."""
    groups: dict[tuple[str, float | None], list[Point]] = {}
    for point in points:
        groups.setdefault((point.contender, point.ratio), []).append(point)
    for alike in groups.values():
        options = [point.runs[0].options for point in alike]
        names = sorted({name for o in options for name in o})
        differing = [n for n in names if any(o.get(n) != options[0].get(n) for o in options)]
        for point, chosen in zip(alike, options):
            words = [f"{name} {chosen.get(name, 'default')}" for name in differing]
            point.remark = f" ({', '.join(words)})" if len(alike) > 1 else ""
