"""The searches of learning rates: how many, where they ended, and whether all had the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cprec_recbole.compare.findings.points import Cell, Point


@dataclass(frozen=True)
class Searches:
    """What was tried to find learning rates, over all points that were trained.

    Attributes:
        cells: of the study.
    """

    cells: Sequence[Cell]

    @cached_property
    def several(self) -> list[Point]:
        """The points that had a choice: one rate is no search."""
        return [p for cell in self.cells for p in cell.points if len(p.search) > 1]

    @property
    def trainings(self) -> int:
        """Trainings in all: runs that were trained, and what the searches took beside them. Of runs
        that came to the same training, each counts."""
        points = [p for cell in self.cells for p in cell.points if any(r.epochs for r in p.runs)]
        runs = sum(bool(run.epochs) for point in points for run in point.runs)
        return runs + sum(max(0, len(point.search) - 1) for point in points)

    @property
    def edges(self) -> tuple[int, int, int]:
        """Of how many searches the highest rate was the best, the lowest, and how many there
        were."""
        won = []
        for point in self.several:
            ended = {t.learning_rate: t.valid for t in point.search if t.valid is not None}
            if ended:
                best = max(ended, key=lambda rate: ended[rate])
                rates = [trial.learning_rate for trial in point.search]
                won.append((best == max(rates), best == min(rates)))
        return sum(high for high, _ in won), sum(low for _, low in won), len(won)

    @property
    def unequal(self) -> list[str]:
        """Where contenders were not searched alike, as sentences: fewer rates than for others of
        their model and data, or seeds that were not all trained at one rate, as where a rate was
        added that won and they were not run again."""
        found = []
        for cell in self.cells:
            points = [point for point in cell.points if point.search]
            most = max((len(point.rates) for point in points), default=0)
            fewer = [f"{p.label} ({len(p.rates)})" for p in points if len(p.rates) < most]
            mixed = [p.label for p in points if len({r.learning_rate for r in p.runs}) > 1]
            if fewer:
                found.append(
                    f"{cell.label}: fewer learning rates than the {most} of others were tried for "
                    f"{', '.join(fewer)}."
                )
            if mixed:
                found.append(f"{cell.label}: seeds at several learning rates: {', '.join(mixed)}.")
        return found
