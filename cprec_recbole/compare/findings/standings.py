"""Where each contender stands over all cells, against the uncompressed model and a chosen rival."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from cprec_recbole.compare.findings.points import Cell, Point, Quantity
from cprec_recbole.compare.results import QUALITY, UNCOMPRESSED
from cprec_recbole.compare.statistics import Difference
from cprec_recbole.config import CompressionError

OURS = ("compressed", "recovered", "recovered-int8")
Ratio = float | None


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
        intervals: of the paired differences, where they are known.
        lost: cells in which the subject of the findings is above it at this ratio, and cells in
            which both were run.
        tested: of how many of these there is an interval of the paired difference.
        surely_lost: cells in which it is below zero.
        surely_won: cells in which it is above zero.
    """

    contender: str
    ratio: Ratio
    shares: list[float] = field(default_factory=list)
    smaller: list[float] = field(default_factory=list)
    slower: list[float] = field(default_factory=list)
    groups: dict[str, list[float]] = field(default_factory=dict)
    intervals: list[Difference] = field(default_factory=list)
    lost: tuple[int, int] = (0, 0)
    tested: int = 0
    surely_lost: int = 0
    surely_won: int = 0

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

    @property
    def group_medians(self) -> dict[str, float]:
        """The median share of each group of items."""
        return {name: median(shares) for name, shares in self.groups.items()}


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
    if against is not None:
        if against not in names:
            known = ", ".join(sorted(set(names))) or "none yet"
            raise CompressionError(
                f"Expected `against` to be out of {known}, but got {against!r}; the uncompressed "
                "model is compared with in any case."
            )
        return against
    ours = [name for name in OURS if name in names]
    return max(ours or sorted(set(names)), key=names.count, default=None)


def standings(cells: Sequence[Cell], subject: str | None) -> list[Standing]:
    """All contenders at all ratios, but the uncompressed model, in the order of the points."""
    found: dict[tuple[str, Ratio], Standing] = {}
    for cell in cells:
        seen = set()
        for point in cell.points:
            key = (point.contender, point.ratio)
            if point.contender == UNCOMPRESSED or key in seen:
                continue
            seen.add(key)
            standing = found.setdefault(key, Standing(*key))
            _add(standing, point, cell)
            _fight(standing, point, cell.rival(subject, point))
    order = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in found))}
    return sorted(found.values(), key=lambda s: (order[s.contender], s.ratio or 0))


def _add(standing: Standing, point: Point, cell: Cell) -> None:
    reference = cell.reference
    if reference is None:
        return
    if (quality := share_of(point, reference, lambda run: run.test[QUALITY])) is not None:
        standing.shares.append(quality)
    if point.size > 0:
        standing.smaller.append(reference.size / point.size)
    if (time := share_of(point, reference, lambda run: run.score_ms)) is not None:
        standing.slower.append(time)
    for group in dict.fromkeys(name for run in point.runs for name in run.popularity):
        if (share := share_of(point, reference, in_group(group))) is not None:
            standing.groups.setdefault(group, []).append(share)
    if point.interval is not None:
        standing.intervals.append(point.interval)


def _fight(standing: Standing, point: Point, subject: Point | None) -> None:
    if (
        subject is not None
        and (both := paired(subject, point, lambda run: run.test[QUALITY])) is not None
    ):
        won, fought = standing.lost
        standing.lost = (won + (both[0] > both[1]), fought + 1)
        if point.to_subject is not None:
            standing.tested += 1
            standing.surely_lost += point.to_subject.high < 0
            standing.surely_won += point.to_subject.low > 0


def share_of(point: Point, reference: Point, quantity: Quantity) -> float | None:
    """A point's mean by the reference's over the seeds that both have; None where there is none, or
    nothing to divide by."""
    both = paired(point, reference, quantity)
    return both[0] / both[1] if both is not None and both[1] > 0 else None


def paired(one: Point, other: Point, quantity: Quantity) -> tuple[float, float] | None:
    """Means of both over the seeds in which both were measured; None for no such seed."""
    theirs = {run.seed: value for run in other.runs if (value := quantity(run)) is not None}
    mine = {run.seed: value for run in one.runs if (value := quantity(run)) is not None}
    common = mine.keys() & theirs.keys()
    if not common:
        return None
    return mean(mine[seed] for seed in common), mean(theirs[seed] for seed in common)


def in_group(group: str) -> Quantity:
    """NDCG@20 of a group of items by popularity."""
    return lambda run: run.popularity.get(group)
