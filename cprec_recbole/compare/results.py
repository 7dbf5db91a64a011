"""Trials in; runs, points, intervals and standings out. Nothing of it is kept."""

from __future__ import annotations

import base64
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from cprec_recbole.compare.contenders import COMPRESSED, UNCOMPRESSED
from cprec_recbole.compare.spec import QUALITY, Cell, Goal, Ratio, Record, Spec, Study
from cprec_recbole.config import CompressionError

STUDY, TRIALS, PACKED = "study.json", "trials", "trials.zip"  # in the folder of a study
RESAMPLES, LEVEL = 10_000, 0.95
OURS = (COMPRESSED, "recovered", "recovered-int8", "recovered-int4")
# contenders in the order in which legends and tables show them; others follow by name
ORDER = (
    *(UNCOMPRESSED, *OURS, "uncompressed-recovered"),
    *("tree", "untied", "blocks-only", "sharing-only", "narrower", "narrower-int8"),
    *("narrower-int4", "one-rank"),
    *("recjpq-hc", "recjpq-svd", "recjpq-random", "hashing", "uniform-svd", "int8", "int4"),
)
_MACHINE = ("processor", "gpu", "torch_threads")  # of an environment: what times depend on
_AT_A_TIME = 2**22  # numbers drawn at a time: 32 MiB


class Figure(NamedTuple):
    """A figure over seeds: mean and sample standard deviation (NaN for one seed)."""

    mean: float
    spread: float

    def __format__(self, form: str) -> str:
        spread = f" ± {self.spread:{form}}" if self.spread > 0 else ""  # not for one seed
        return f"{self.mean:{form}}{spread}"


@dataclass(frozen=True)
class Difference:
    """A mean difference over users and its interval."""

    mean: float
    low: float
    high: float
    users: int
    seeds: int  # that each user's difference is the mean of

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def verdict(self) -> str:
        """`better` where the interval is above zero, `worse` where it is below it, else `not told
        apart`: the interval says how large a difference may still be."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"


@dataclass(frozen=True)
class Run:
    """The trial that counts for a contender with a seed."""

    goal: Goal
    record: Record  # what was found; of a run that failed its `error` alone
    # learning rates tried with the first seed; what each reached on validation, None: it failed
    search: dict[float, float | None] = field(default_factory=dict)
    is_elsewhere: bool = False  # on another machine than the rest of its cell: no times
    # milliseconds to score the catalogue for one user. Where a plain model was timed beside it, by
    # that: what the run's time would be while that took its usual time
    score_ms: float | None = None

    @cached_property
    def users(self) -> np.ndarray | None:
        """NDCG@20 of each test user by rising id, `[users]`; None where it was not kept."""
        packed = self.record.get("users")
        return None if packed is None else unpack_users(packed)

    @property
    def figures(self) -> dict[str, float | None]:
        """What points have means of: metrics on the test set, costs, NDCG@20 and HR@20 of each
        group of items by popularity, and coverage; None: not measured, or no such case."""
        record, parts = self.record, self.record["parameters"]
        seconds = None if self.is_elsewhere else record.get("epoch_seconds")
        names = ("bytes", "weight_bytes", "checkpoint_bytes", "best_epoch", "coverage")
        groups, total = record.get("popularity") or {}, sum(parts.values())
        return {
            **record["test"],
            **{f"parameters: {part}": count for part, count in parts.items()},
            **{f"popularity: {group}": found.get(QUALITY) for group, found in groups.items()},
            **{f"hit@20: {group}": found.get("hit@20") for group, found in groups.items()},
            **{name: record.get(name) for name in names},
            "parameters": total,
            "size": record.get("bytes") or 4 * total,  # of float32 where a study does not tell
            "epoch_seconds": median(seconds) if seconds else None,
            "score_ms": self.score_ms,
        }


class Point:
    """One contender at one ratio in a cell: its runs, a seed each."""

    def __init__(self, runs: list[Run]) -> None:
        goal = runs[0].goal
        self.runs, self.search = runs, runs[0].search
        self.contender, self.ratio, self.label = goal.contender, goal.ratio, goal.label
        self._values: dict[str, dict[int, float]] = {}  # by name and seed
        for run in runs:
            for name, value in run.figures.items():
                if value is not None:
                    self._values.setdefault(name, {})[run.goal.seed] = value
        self.groups = dict.fromkeys(g for r in runs for g in r.record.get("popularity") or ())
        self.quality = self.figure(QUALITY)
        self.parameters = mean(self._values["parameters"].values())
        self.size = mean(self._values["size"].values())  # bytes of the weights
        self.whole: Point | None = None  # the uncompressed model of its cell
        self.rival: Point | None = None  # the subject at its ratio, or where that has none
        self.interval: Difference | None = None  # to the one
        self.to_subject: Difference | None = None  # to the other

    def figure(self, name: str) -> Figure | None:
        """Mean and spread over the runs in which this was measured."""
        values = list(self._values.get(name, {}).values())
        spread = stdev(values) if len(values) > 1 else math.nan
        return Figure(mean(values), spread) if values else None

    def beside(self, other: Point | None, name: str = QUALITY) -> tuple[float, float] | None:
        """Its mean and another's over the seeds in which both were measured; None for no such."""
        mine, theirs = (point._values.get(name, {}) if point else {} for point in (self, other))
        common = mine.keys() & theirs.keys()
        return (mean(mine[s] for s in common), mean(theirs[s] for s in common)) if common else None

    def share(self, name: str = QUALITY) -> float | None:
        """Its mean by the uncompressed model's; None where there is nothing to divide by."""
        both = self.beside(self.whole, name)
        return both[0] / both[1] if both is not None and both[1] > 0 else None


@dataclass
class Table:
    """The points of a cell, contenders in the order of the legend."""

    cell: Cell
    about: dict[str, Any]  # of its data: users, items
    points: list[Point]

    @property
    def reference(self) -> Point | None:
        """The uncompressed model."""
        return self.find(UNCOMPRESSED, None)

    def find(self, contender: str | None, ratio: Ratio) -> Point | None:
        """A contender's point at a ratio."""
        found = (p for p in self.points if (p.contender, p.ratio) == (contender, ratio))
        return next(found, None)


class Standing:
    """One contender at one ratio, by its points in all cells."""

    def __init__(self, points: Sequence[Point]) -> None:
        def shares(name: str) -> list[float]:
            return [share for point in points if (share := point.share(name)) is not None]

        point = points[0]
        self.contender, self.ratio, self.label = point.contender, point.ratio, point.label
        # shares of the uncompressed model's figures, a cell each
        self.shares, self.slower = shares(QUALITY), shares("score_ms")
        groups = dict.fromkeys(group for p in points if p.whole for group in p.groups)
        self.groups = {group: shares(f"popularity: {group}") for group in groups}
        self.smaller = [p.whole.size / p.size for p in points if p.whole]
        self.not_below = sum(share >= 1 for share in self.shares)
        self.intervals = [p.interval for p in points if p.interval]
        self.certain = sum(interval.high >= 0 for interval in self.intervals)  # not below
        pairs = [both for point in points if (both := point.beside(point.rival)) is not None]
        self.below = [mine < theirs for mine, theirs in pairs]  # the rival, a cell each
        self.to_subject = [p.to_subject for p in points if p.to_subject]


class Findings:
    """A study as its folder tells it.

    Attributes:
        tables: a model on a data set each; `points` and `finished` runs are those of all.
        failed: the runs that have an error instead; `failures` says which and why.
        subject: the contender that the findings are about, and that others are measured against
            beside the uncompressed model; None where nothing else was run.
        searches: what those points tried that had a choice of learning rates; in `edges`, of how
            many the highest rate was the best, and the lowest.
        trainings: how many in all. Of runs that came to the same training, each counts.
        missing: what was asked for and is not there yet; not what cannot be or would be another.
    """

    def __init__(
        self, study: Study, tables: list[Table], failed: list[Run], subject: str | None
    ) -> None:
        self.study, self.tables, self.failed, self.subject = study, tables, failed, subject
        self.points = [point for table in tables for point in table.points]
        self.finished = [run for point in self.points for run in point.runs]
        self.failures = _together((run.goal, run.record["error"]) for run in failed)
        known = {run.goal for run in self.finished + failed}
        left = [goal for goal in study.spec.goals() if goal not in known]
        left = [goal for goal in left if isinstance(study.made(goal, {}), dict)]
        self.missing = [words for words, _ in _together((goal, "") for goal in left)]
        trained = [[run for run in p.runs if run.record.get("epochs")] for p in self.points]
        tried = [len(runs) + max(0, len(runs[0].search) - 1) for runs in trained if runs]
        self.trainings, self.edges = sum(tried), [0, 0]
        self.searches = [point.search for point in self.points if len(point.search) > 1]
        for search in self.searches:
            ended = {rate: valid for rate, valid in search.items() if valid is not None}
            best = max(ended, key=ended.__getitem__)
            self.edges = [n + (best == end(search)) for n, end in zip(self.edges, (max, min))]

    @property
    def standings(self) -> list[Standing]:
        """All contenders at all ratios, but the uncompressed model, in the order of the points."""
        found: dict[tuple[str, Ratio], list[Point]] = {}
        for point in self.points:
            if point.contender != UNCOMPRESSED:
                found.setdefault((point.contender, point.ratio), []).append(point)
        order = in_order(name for name, _ in found)
        keys = sorted(found, key=lambda key: (order.index(key[0]), key[1] or 0))
        return [Standing(found[key]) for key in keys]

    @property
    def unequal(self) -> list[str]:
        """Where fewer rates were tried than for others of the cell, as sentences."""
        found = []
        for table in self.tables:
            searched = [point for point in table.points if point.search]
            most = max((len(point.search) for point in searched), default=0)
            fewer = [f"{p.label} ({len(p.search)})" for p in searched if len(p.search) < most]
            text = f"fewer learning rates than the {most} of others were tried for"
            found += [f"{table.cell.label}: {text} {', '.join(fewer)}."] if fewer else []
        return found


def _together(goals: Iterable[tuple[Goal, str]]) -> list[tuple[str, str]]:
    """What is said of a place, and a reason; one for each place and reason."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for goal, reason in goals:
        seeds.setdefault((goal.cell.label, reason, goal.label), []).append(goal.seed)
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (place, reason, name), own in seeds.items():
        found.setdefault((place, reason), {}).setdefault(listed(own), []).append(name)
    return [
        (f"{place}: {', '.join(f'{listed(who)} (seeds {s})' for s, who in by.items())}", reason)
        for (place, reason), by in found.items()
    ]


def listed(words: Iterable[Any]) -> str:
    """`a, b and c`."""
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


def in_order(contenders: Iterable[str]) -> list[str]:
    """Each name once, in the order in which legends and tables show them."""
    names = set(contenders)
    return [*(name for name in ORDER if name in names), *sorted(names - set(ORDER))]


def read_study(folder: Path) -> Study:
    """What was asked for in a folder; a CompressionError for no study, or a file that cannot be
    read, which it names."""
    path = Path(folder) / STUDY
    if not path.exists():
        raise CompressionError(
            f"Expected `out` to be the folder of a study, but got no file {path}; run "
            "`cprec compare` with that --out first."
        )
    given = _read(path)
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
    return _read(file, "test", "valid", "parameters")


def _read(file: Any, *needed: str) -> dict[str, Any]:
    """The names and values in a file; names that are needed, unless it holds an `error`."""
    try:
        found = {**json.loads(file.read_text(encoding="utf-8"))}
        return found if "error" in found else {**{name: found[name] for name in needed}, **found}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        with_these = f" with {', '.join(needed)}" if needed else ""
        raise CompressionError(
            f"Expected {file} to hold JSON{with_these}, but got {str(error)[:200]}; remove it, and "
            "run again."
        ) from None


def pack_users(values: np.ndarray) -> str:
    """NDCG@20 of each test user, `[users]`, as a text."""
    return base64.b64encode(zlib.compress(values.astype("<f4").tobytes(), 9)).decode()


def unpack_users(text: str) -> np.ndarray:
    """What `pack_users` packed, `[users]` of float32."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4")


def findings_of(folder: Path, against: str | None = None) -> Findings:
    """Read a study, and put its runs together. They are about the contender `against`; None: of
    ours the one that was run most often. A CompressionError for no study or no run, a file that
    cannot be read (it is named), or no run of `against`."""
    study, found = read_study(folder), read_trials(folder)
    runs = list(_runs(study, found))
    if not runs:
        raise CompressionError(
            f"Expected `out` to be the folder of a study, but {folder} has no run of one yet."
        )
    cells: dict[Cell, list[Run]] = {}
    for run in runs:
        if "error" not in run.record:
            cells.setdefault(run.goal.cell, []).append(run)
    order = in_order(run.goal.contender for each in cells.values() for run in each)
    tables = []
    for cell in sorted(cells):
        own = _with_comparable_times(cells[cell])
        own.sort(key=lambda r: (order.index(r.goal.contender), r.goal.ratio or 0, r.goal.seed))
        points = [Point(list(each)) for _, each in groupby(own, lambda run: run.goal.name)]
        tables.append(Table(cell, study.plans[str(cell)]["about"], points))
    names = [point.contender for table in tables for point in table.points]
    subject = subject_of(names, against)
    for table in tables:
        for point in table.points:
            if point is not table.reference:
                point.whole = table.reference
            if point.contender != subject:
                point.rival = table.find(subject, point.ratio) or table.find(subject, None)
            point.interval = _interval(point, point.whole)
            point.to_subject = _interval(point, point.rival)
    return Findings(study, tables, [run for run in runs if "error" in run.record], subject)


def _runs(study: Study, found: dict[str, Record]) -> Iterable[Run]:
    """The runs that there are, also those that failed."""
    for goal in study.spec.goals():
        made, first = study.made(goal), goal._replace(seed=study.spec.seeds[0])
        if made is None:  # not asked for yet, or the same model as another
            continue
        state = study.state(goal, found, partly=True)
        if state.best is not None:
            tried = study.state(first, found, partly=True).tried
            valid = {t.rate: record.get("valid", {}).get(QUALITY) for t, record in tried}
            search = {rate: value for rate, value in valid.items() if rate is not None}
            yield Run(goal, state.best[1], search)
        elif state.error is not None and (goal == first or isinstance(made, dict)):
            yield Run(goal, {"error": state.error})  # what cannot be is said once


def _with_comparable_times(runs: Sequence[Run]) -> list[Run]:
    """The runs of a cell, those without their times that were trained on another machine than the
    uncompressed model (without one, than the lowest seed)."""

    def machine_of(run: Run) -> list[Any]:
        return [run.record.get("environment", {}).get(name) for name in _MACHINE]

    first = min(runs, key=lambda run: (run.goal.contender != UNCOMPRESSED, run.goal.seed))
    here = [run.record for run in runs if machine_of(run) == machine_of(first)]
    plain = [record["plain_ms"] for record in here if "plain_ms" in record]
    found = []
    for run in runs:
        took, beside = run.record.get("score_ms"), run.record.get("plain_ms")
        is_elsewhere = machine_of(run) != machine_of(first)
        if took and beside and plain:
            took *= median(plain) / beside
        elif is_elsewhere:
            took = None
        found.append(replace(run, is_elsewhere=is_elsewhere, score_ms=took))
    return found


def subject_of(contenders: Iterable[str], against: str | None = None) -> str | None:
    """Whom the findings are about: `against`, or of our own contenders the one that was run most
    often, of equals the first; or else the one of all. `contenders` has a name for each ratio in
    each cell. A CompressionError where `against` is not in it, or is the uncompressed model."""
    names = [name for name in contenders if name != UNCOMPRESSED]
    if against is not None and against not in names:
        known = ", ".join(sorted(set(names))) or "none yet"
        raise CompressionError(
            f"Expected `against` to be out of {known}, but got {against!r}; the uncompressed "
            "model is compared with in any case."
        )
    ours = [name for name in OURS if name in names]
    return against or max(ours or sorted(set(names)), key=names.count, default=None)


def _interval(point: Point, other: Point | None) -> Difference | None:
    """Of the seeds that both have; None where there is none, or the users of a run are missing."""
    theirs = {run.goal.seed: run.users for run in other.runs} if other else {}
    pairs = [(r.users, theirs[r.goal.seed]) for r in point.runs if r.goal.seed in theirs]
    if not pairs or any(users is None for pair in pairs for users in pair):
        return None
    return paired_difference(*zip(*pairs))


def paired_difference(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, seed: int = 0
) -> Difference:
    """The mean over users of `ours - theirs`, with a percentile bootstrap interval.

    A user's difference is averaged over seeds first; then users are resampled. The interval says
    what another sample of users would give for these trainings, not what other trainings would.
    Both have a value for each user, `[users]` for each seed, in the same order; a CompressionError
    for none, or for values of other users or seeds. `seed` is that of the draws.
    """
    shapes = {np.shape(values) for values in (*ours, *theirs)}
    shape = shapes.pop() if len(shapes) == 1 else ()
    if len(ours) != len(theirs) or len(shape) != 1 or not shape[0]:
        raise CompressionError(
            f"Expected values of the same users and seeds, [users] for each seed, but got "
            f"{[np.shape(v) for v in ours]} and {[np.shape(v) for v in theirs]}."
        )
    mine = np.mean([np.subtract(*pair, dtype=np.float64) for pair in zip(ours, theirs)], 0)
    mine = mine.round(9)  # equal but for rounding is equal
    means = resampled_means(mine, RESAMPLES, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(mine.mean()), float(low), float(high), len(mine), len(ours))


def resampled_means(
    values: np.ndarray, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Means of samples of users, drawn with replacement and as large as the users, `[resamples]`.
    Most users have a difference of zero: how many of a sample have another one follows a binomial
    law, and only those are drawn."""
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
