"""Trials in; runs, points, intervals and standings out. Nothing of it is kept."""

from __future__ import annotations

import base64
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from cprec_recbole.compare.contenders import COMPRESSED, UNCOMPRESSED
from cprec_recbole.compare.spec import QUALITY, Cell, Failed, Goal, Ratio, Record, Spec, Study
from cprec_recbole.config import CompressionError

STUDY, TRIALS, PACKED = "study.json", "trials", "trials.zip"  # in the folder of a study
RESAMPLES, LEVEL = 10_000, 0.95
OURS = (COMPRESSED, "recovered", "recovered-int8")
# contenders in the order in which legends and tables show them; others follow by name
ORDER = (
    *(UNCOMPRESSED, *OURS, "uncompressed-recovered"),
    *("tree", "untied", "blocks-only", "sharing-only", "narrower", "narrower-int8", "one-rank"),
    *("recjpq-svd", "recjpq-random", "hashing", "uniform-svd", "int8"),
)
_MACHINE = ("processor", "gpu", "torch_threads")  # of an environment: what times depend on
_AT_A_TIME = 2**22  # numbers drawn at a time: 32 MiB


class Figure(NamedTuple):
    """A figure over seeds: mean and sample standard deviation (NaN for one seed)."""

    mean: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Sum values up."""
        return cls(mean(values), stdev(values) if len(values) > 1 else math.nan)


@dataclass(frozen=True)
class Run:
    """The trial that counts for a contender with a seed.

    Attributes:
        goal: what it is the run of.
        record: what was found; of a run that failed its `error` alone.
        search: learning rates that were tried with the first seed, and what each reached on
            validation (None: it failed).
        is_elsewhere: it was trained on another machine than the rest of its cell, and its times are
            left out.
        score_ms: milliseconds to score the catalogue for one user. Where a plain model was timed
            beside it, by that: what the run's time would be while that took its usual time.
    """

    goal: Goal
    record: Record
    search: dict[float, float | None] = field(default_factory=dict)
    is_elsewhere: bool = False
    score_ms: float | None = None

    @property
    def error(self) -> str | None:
        """Why it failed; None for a run that finished."""
        return self.record.get("error")

    @property
    def epoch_seconds(self) -> float | None:
        """Median seconds of its training epochs."""
        seconds = None if self.is_elsewhere else self.record.get("epoch_seconds")
        return median(seconds) if seconds else None

    @cached_property
    def users(self) -> np.ndarray | None:
        """NDCG@20 of each test user by rising id, `[users]`; None where it was not kept."""
        packed = self.record.get("users")
        return None if packed is None else unpack_users(packed)

    def popularity(self, group: str) -> float | None:
        """NDCG@20 of a group of items by popularity; None where it holds no case."""
        return self.record.get("popularity", {}).get(group, {}).get(QUALITY)

    @property
    def machine(self) -> tuple[Any, ...]:
        """On what it was timed."""
        return tuple(self.record.get("environment", {}).get(name) for name in _MACHINE)


Quantity = Callable[[Run], float | None]


@dataclass
class Point:
    """One contender at one ratio in a cell: its runs, a seed each."""

    contender: str
    ratio: Ratio
    runs: list[Run]
    interval: Difference | None = None  # to the uncompressed model
    to_subject: Difference | None = None  # and to the subject of the findings, at the same ratio

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return self.contender + ("" if self.ratio is None else f" ÷\u00a0{self.ratio:g}")

    @property
    def search(self) -> dict[float, float | None]:
        """The learning rates that were tried, with the first seed."""
        return self.runs[0].search

    def figure(self, quantity: Quantity | str) -> Figure | None:
        """Mean and spread over the runs in which this was measured: a function of a run, or a name
        in its record."""
        of = (lambda run: run.record.get(quantity)) if isinstance(quantity, str) else quantity
        values = [value for run in self.runs if (value := of(run)) is not None]
        return Figure.of(values) if values else None

    def metric(self, name: str) -> Figure | None:
        """A metric on the test set."""
        return self.figure(lambda run: run.record["test"].get(name))

    @cached_property
    def quality(self) -> Figure:
        """NDCG@20 on the test set."""
        return Figure.of([run.record["test"][QUALITY] for run in self.runs])

    @cached_property
    def parameters(self) -> float:
        """All parameters."""
        return mean(sum(run.record["parameters"].values()) for run in self.runs)

    @cached_property
    def size(self) -> float:
        """Bytes of the weights; where a study does not tell them, those of float32."""
        known = self.figure("bytes")
        return 4 * self.parameters if known is None else known.mean


@dataclass
class Table:
    """The points of a cell, contenders in the order of the legend."""

    cell: Cell
    about: dict[str, Any]  # of its data: users, items
    points: list[Point] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What the text calls it."""
        return f"{self.cell.model} on {self.cell.dataset}, length {self.cell.length}"

    @cached_property
    def reference(self) -> Point | None:
        """The uncompressed model."""
        return self.find(UNCOMPRESSED, None)

    @cached_property
    def users(self) -> int | None:
        """Test users, where their figures were kept."""
        found = [run.users for point in self.points for run in point.runs]
        return next((len(users) for users in found if users is not None), None)

    def find(self, contender: str | None, ratio: Ratio) -> Point | None:
        """A contender's point at a ratio."""
        found = (p for p in self.points if (p.contender, p.ratio) == (contender, ratio))
        return next(found, None)

    def rival(self, subject: str | None, point: Point) -> Point | None:
        """The subject at a point's ratio, or where it has none; None for the subject's own."""
        if subject == point.contender:
            return None
        return self.find(subject, point.ratio) or self.find(subject, None)


@dataclass
class Findings:
    """A study as its folder tells it.

    Attributes:
        study: what was asked for.
        tables: a model on a data set each, with its points and their intervals.
        failed: the runs that have an error instead.
        subject: the contender that the findings are about, and that others are measured against
            beside the uncompressed model; None where nothing else was run.
    """

    study: Study
    tables: list[Table]
    failed: list[Run]
    subject: str | None

    @property
    def finished(self) -> list[Run]:
        """The runs that have results."""
        return [run for table in self.tables for point in table.points for run in point.runs]

    @cached_property
    def standings(self) -> list[Standing]:
        """All contenders at all ratios, but the uncompressed model, in the order of the points."""
        found: dict[tuple[str, Ratio], Standing] = {}
        for table in self.tables:
            for point in table.points:
                if point.contender != UNCOMPRESSED:
                    key = point.contender, point.ratio
                    found.setdefault(key, Standing(*key)).add(point, table, self.subject)
        order = in_order(name for name, _ in found)
        return sorted(found.values(), key=lambda s: (order.index(s.contender), s.ratio or 0))

    @cached_property
    def searches(self) -> list[Point]:
        """The points that had a choice of learning rates."""
        return [p for table in self.tables for p in table.points if len(p.search) > 1]

    @property
    def trainings(self) -> int:
        """Trainings in all. Of runs that came to the same training, each counts."""
        points = [p for table in self.tables for p in table.points]
        trained = [p for p in points if any(run.record.get("epochs") for run in p.runs)]
        runs = sum(bool(run.record.get("epochs")) for point in trained for run in point.runs)
        return runs + sum(max(0, len(point.search) - 1) for point in trained)

    @property
    def edges(self) -> tuple[int, int, int]:
        """Of how many searches the highest rate was the best, the lowest, and how many there
        were."""
        won = []
        for search in (point.search for point in self.searches):
            ended = {rate: valid for rate, valid in search.items() if valid is not None}
            best = max(ended, key=lambda rate: ended[rate])
            won.append((best == max(search), best == min(search)))
        return sum(high for high, _ in won), sum(low for _, low in won), len(won)

    @property
    def unequal(self) -> list[str]:
        """Where fewer rates were tried than for others of the cell, as sentences."""
        found = []
        for table in self.tables:
            searched = [point for point in table.points if point.search]
            most = max((len(point.search) for point in searched), default=0)
            fewer = [f"{p.label} ({len(p.search)})" for p in searched if len(p.search) < most]
            if fewer:
                found.append(
                    f"{table.label}: fewer learning rates than the {most} of others were tried for "
                    f"{', '.join(fewer)}."
                )
        return found


@dataclass
class Standing:
    """One contender at one ratio, over the cells that have an uncompressed model.

    Attributes:
        contender: its name.
        ratio: the ratio that was aimed at.
        shares: its NDCG@20 by the uncompressed model's, a cell each.
        smaller: the uncompressed model's size by its own, a cell each.
        slower: its milliseconds to score a user by the uncompressed model's, a cell each.
        groups: shares of the NDCG@20 of each group of items by popularity.
        intervals: of the paired differences to the uncompressed model, where they are known.
        below: for each cell with a rival, whether it is below the subject of the findings.
        to_subject: intervals of the paired differences to that.
    """

    contender: str
    ratio: Ratio
    shares: list[float] = field(default_factory=list)
    smaller: list[float] = field(default_factory=list)
    slower: list[float] = field(default_factory=list)
    groups: dict[str, list[float]] = field(default_factory=dict)
    intervals: list[Difference] = field(default_factory=list)
    below: list[bool] = field(default_factory=list)
    to_subject: list[Difference] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What tables call it."""
        return Point(self.contender, self.ratio, []).label

    @property
    def not_below(self) -> int:
        """In how many cells it is not below the uncompressed model."""
        return sum(share >= 1 for share in self.shares)

    @property
    def certain(self) -> int:
        """In how many cells the interval of the difference includes or exceeds zero."""
        return sum(interval.high >= 0 for interval in self.intervals)

    def add(self, point: Point, table: Table, subject: str | None) -> None:
        """Take a cell in."""
        reference, rival = table.reference, table.rival(subject, point)
        if reference is not None:
            groups = dict.fromkeys(g for r in point.runs for g in r.record.get("popularity", {}))
            wanted: list[tuple[list[float], Quantity]] = [
                (self.shares, quality_of),
                (self.slower, lambda run: run.score_ms),
                *((self.groups.setdefault(g, []), in_group(g)) for g in groups),
            ]
            for values, quantity in wanted:
                if (share := share_of(point, reference, quantity)) is not None:
                    values.append(share)
            if point.size > 0:
                self.smaller.append(reference.size / point.size)
            if point.interval is not None:
                self.intervals.append(point.interval)
        if rival is not None and (both := paired(rival, point, quality_of)) is not None:
            self.below.append(both[0] > both[1])
            if point.to_subject is not None:
                self.to_subject.append(point.to_subject)


def quality_of(run: Run) -> float:
    """NDCG@20 on the test set."""
    return float(run.record["test"][QUALITY])


def in_group(group: str) -> Quantity:
    """NDCG@20 of a group of items by popularity."""
    return lambda run: run.popularity(group)


def share_of(point: Point, reference: Point, quantity: Quantity) -> float | None:
    """A point's mean by the reference's over the seeds that both have; None where there is none, or
    nothing to divide by."""
    both = paired(point, reference, quantity)
    return both[0] / both[1] if both is not None and both[1] > 0 else None


def paired(one: Point, other: Point, quantity: Quantity) -> tuple[float, float] | None:
    """Means of both over the seeds in which both were measured; None for no such seed."""
    theirs, mine = (
        {run.goal.seed: value for run in point.runs if (value := quantity(run)) is not None}
        for point in (other, one)
    )
    common = mine.keys() & theirs.keys()
    if not common:
        return None
    return mean(mine[seed] for seed in common), mean(theirs[seed] for seed in common)


def in_order(contenders: Iterable[str]) -> list[str]:
    """Each name once, in the order in which legends and tables show them."""
    names = set(contenders)
    return [*(name for name in ORDER if name in names), *sorted(names - set(ORDER))]


def read_study(folder: Path) -> Study:
    """What was asked for in a folder.

    Raises:
        CompressionError: no study, or a file that cannot be read; it is named.
    """
    path = Path(folder) / STUDY
    if not path.exists():
        raise CompressionError(
            f"Expected `out` to be the folder of a study, but got no file {path}; run it first "
            "with --study."
        )
    given = _read(path, path.read_text(encoding="utf-8"))
    try:
        return Study(Spec.from_dict(given["spec"]), dict(given["cells"]), given["command"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CompressionError(
            f"Expected {path} to be of this version of cprec_recbole, but got {error!r}; use "
            "another --out."
        ) from None


def read_trials(folder: Path) -> dict[str, Record]:
    """The records of all trials in a folder, of those that are packed too, by their names."""
    packed = Path(folder) / PACKED
    files: list[Any] = [*zipfile.Path(packed).iterdir()] if packed.exists() else []
    files += sorted((Path(folder) / TRIALS).glob("[!.]*.json"))
    return {file.name.removesuffix(".json"): read_trial(file) for file in files}


def read_trial(file: Any) -> Record:
    """The record of a trial."""
    record = _read(file, file.read_text(encoding="utf-8"))
    if "error" not in record and not {"test", "valid", "parameters"} <= record.keys():
        raise _damaged(file, "the results of a trial", ", ".join(record))
    return record


def _read(path: Any, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "JSON", str(error)) from None
    if not isinstance(found, dict):
        raise _damaged(path, "a JSON object", type(found).__name__)
    return found


def _damaged(path: Any, expected: str, got: str) -> CompressionError:
    return CompressionError(
        f"Expected {path} to hold {expected}, but got {got[:200]}; remove it, and run again."
    )


def pack_users(values: np.ndarray) -> str:
    """NDCG@20 of each test user, `[users]`, as a text."""
    return base64.b64encode(zlib.compress(values.astype("<f4").tobytes(), 9)).decode()


def unpack_users(text: str) -> np.ndarray:
    """What `pack_users` packed, `[users]` of float32."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4")


def findings_of(folder: Path, against: str | None = None) -> Findings:
    """Read a study, and put its runs together.

    Args:
        folder: of the study.
        against: the contender that the findings are about; None: of ours the one that was run
            most often.

    Raises:
        CompressionError: no study or no run, a file that cannot be read (it is named), or no run
            of `against`.
    """
    study, found = read_study(folder), read_trials(folder)
    runs = list(_runs(study, found))
    if not runs:
        raise CompressionError(
            f"Expected `out` to be the folder of a study, but {folder} has no run of one yet."
        )
    finished = _with_comparable_times([run for run in runs if run.error is None])
    tables: dict[Cell, Table] = {}
    order = in_order(run.goal.contender for run in finished)
    finished.sort(key=lambda r: (order.index(r.goal.contender), r.goal.ratio or 0, r.goal.seed))
    for run in finished:
        cell, contender, ratio, _ = run.goal
        table = tables.setdefault(cell, Table(cell, study.plans[str(cell)]["about"]))
        point = table.find(contender, ratio)
        if point is None:
            table.points.append(Point(contender, ratio, [run]))
        else:
            point.runs.append(run)
    points = [point for table in tables.values() for point in table.points]
    subject = subject_of((point.contender for point in points), against)
    for table in tables.values():
        for point in table.points:
            if point is not table.reference:
                point.interval = _interval(point, table.reference)
            point.to_subject = _interval(point, table.rival(subject, point))
    failed = [run for run in runs if run.error is not None]
    return Findings(study, [tables[cell] for cell in sorted(tables)], failed, subject)


def _runs(study: Study, found: dict[str, Record]) -> Iterable[Run]:
    """The runs that there are, also those that failed."""
    for goal in study.spec.goals():
        plan = study.plans.get(str(goal.cell), {"contenders": {}})
        made = plan["contenders"].get(goal.name)
        if made is None:  # not asked for yet, or the same model as another
            continue
        first = goal._replace(seed=study.spec.seeds[0])
        try:
            chosen = study.choose(goal, found, partly=True)
            searched = chosen and study.choose(first, found, partly=True)
        except Failed as error:
            if goal == first or not isinstance(made, str):
                yield Run(goal, {"error": str(error)})  # what cannot be is said once
            continue
        if chosen is not None:
            tried = searched.tried if searched else []
            search = {
                trial.rate: record["valid"][QUALITY] if "valid" in record else None
                for trial, record in tried
                if trial.rate is not None
            }
            yield Run(goal, chosen.record, search)


def _with_comparable_times(runs: Sequence[Run]) -> list[Run]:
    """The runs, those without their times that were trained on another machine than the
    uncompressed model of their cell (without one, than the lowest seed)."""
    machines: dict[Cell, tuple[Any, ...]] = {}
    plain: dict[Cell, list[float]] = {}
    for run in sorted(runs, key=lambda run: (run.goal.contender != UNCOMPRESSED, run.goal.seed)):
        at = machines.setdefault(run.goal.cell, run.machine)
        if run.machine == at and "plain_ms" in run.record:
            plain.setdefault(run.goal.cell, []).append(run.record["plain_ms"])
    found = []
    for run in runs:
        cell, took, beside = run.goal.cell, run.record.get("score_ms"), run.record.get("plain_ms")
        is_elsewhere = run.machine != machines[cell]
        if took and beside and cell in plain:
            took *= median(plain[cell]) / beside
        elif is_elsewhere:
            took = None
        found.append(replace(run, is_elsewhere=is_elsewhere, score_ms=took))
    return found


def subject_of(contenders: Iterable[str], against: str | None = None) -> str | None:
    """Whom the findings are about: of our own contenders the one that was run most often, of
    equals the first; or else the one of all.

    Args:
        contenders: a name for each ratio at which it was run in a cell.
        against: the one that is wanted; None for no wish.

    Raises:
        CompressionError: `against` is not among them, or is the uncompressed model.
    """
    names = [name for name in contenders if name != UNCOMPRESSED]
    if against is not None and against not in names:
        known = ", ".join(sorted(set(names))) or "none yet"
        raise CompressionError(
            f"Expected `against` to be out of {known}, but got {against!r}; the uncompressed "
            "model is compared with in any case."
        )
    ours = [name for name in OURS if name in names]
    return against or max(ours or sorted(set(names)), key=names.count, default=None)


@dataclass(frozen=True)
class Difference:
    """A mean difference over users and its interval.

    Attributes:
        mean: of the users' differences.
        low: lower end of the interval.
        high: upper end.
        users: how many users.
        seeds: how many seeds each user's difference is the mean of.
    """

    mean: float
    low: float
    high: float
    users: int
    seeds: int

    @property
    def verdict(self) -> str:
        """`better` where the interval is above zero, `worse` where it is below it, else `not told
        apart`: the interval says how large a difference may still be."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not told apart"


def _interval(point: Point, other: Point | None) -> Difference | None:
    """Of the seeds that both have; None where there is none, or the users of a run are missing."""
    theirs = {run.goal.seed: run.users for run in other.runs} if other else {}
    pairs = [(r.users, theirs[r.goal.seed]) for r in point.runs if r.goal.seed in theirs]
    whole = [(ours, others) for ours, others in pairs if ours is not None and others is not None]
    if not pairs or len(whole) < len(pairs):
        return None
    return paired_difference([ours for ours, _ in whole], [others for _, others in whole])


def paired_difference(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, seed: int = 0
) -> Difference:
    """The mean over users of `ours - theirs`, with a percentile bootstrap interval.

    A user's difference is averaged over seeds first; then users are resampled. The interval says
    what another sample of users would give for these trainings, not what other trainings would.

    Args:
        ours: one contender's value for each user, `[users]` for each seed.
        theirs: the other's, the same users and seeds in the same order.
        seed: of the draws.

    Raises:
        CompressionError: nothing to compare, or values of other users or seeds.
    """
    shapes = {np.shape(values) for values in (*ours, *theirs)}
    shape = shapes.pop() if len(shapes) == 1 else ()
    if len(ours) != len(theirs) or len(shape) != 1 or not shape[0]:
        raise CompressionError(
            f"Expected values of the same users and seeds, [users] for each seed, but got "
            f"{[np.shape(v) for v in ours]} and {[np.shape(v) for v in theirs]}."
        )
    pairs = zip(ours, theirs)
    mine = np.mean([np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs], 0)
    mine = mine.round(9)  # equal but for rounding is equal
    means = resampled_means(mine, RESAMPLES, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(mine.mean()), float(low), float(high), len(mine), len(ours))


def resampled_means(
    values: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Means of samples of users, drawn with replacement and as large as the users, `[resamples]`.

    Most users have a difference of zero. How many of a sample have another one follows a binomial
    law; only those are drawn.
    """
    others = values[values != 0]
    if not len(others):
        return np.zeros(resamples)
    n_drawn = generator.binomial(len(values), len(others) / len(values), size=resamples)
    rows = max(1, _AT_A_TIME // max(1, int(n_drawn.max())))
    sums = []
    for start in range(0, resamples, rows):
        wanted = n_drawn[start : start + rows, None]
        drawn = generator.integers(len(others), size=(len(wanted), int(wanted.max())))
        counted = np.arange(drawn.shape[1]) < wanted
        sums.append(np.where(counted, others[drawn], 0.0).sum(1))
    return np.concatenate(sums) / len(values)
