"""A study's runs, the points and cells that they make, and whom they are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cprec_recbole.compare.findings.intervals import add_intervals
from cprec_recbole.compare.findings.points import Cell, make_cells
from cprec_recbole.compare.findings.runs import StudyRun, read_runs, with_comparable_times
from cprec_recbole.compare.findings.standings import subject_of


@dataclass(frozen=True)
class Findings:
    """A study as its folder tells it.

    Attributes:
        runs: all of them, by the names of their files; times that were measured on another machine
            than the uncompressed model's are left out.
        cells: a model on a data set each, with its points and their intervals.
        subject: the contender that the findings are about, and that others are measured against
            beside the uncompressed model; None where nothing else was run.
    """

    runs: tuple[StudyRun, ...]
    cells: tuple[Cell, ...]
    subject: str | None

    @property
    def finished(self) -> list[StudyRun]:
        """The runs that have results."""
        return [run for run in self.runs if run.error is None]

    @property
    def failed(self) -> list[StudyRun]:
        """Those that have an error instead."""
        return [run for run in self.runs if run.error is not None]


def findings_of(folder: Path, against: str | None = None) -> Findings:
    """Read the runs of a study, and put them together.

    Args:
        folder: holds `runs/*.json`, a run each, and beside each `<key>.npy`, every test user's
            NDCG@20. Points without that have no intervals.
        against: the contender that the findings are about; None: of ours the one that was run
            most often.

    Raises:
        CompressionError: no run, a file that cannot be read or does not match its pair (it is
            named), or no run of `against`.
    """
    runs = with_comparable_times(read_runs(folder))
    cells = make_cells(runs)
    subject = _subject(cells, against)
    add_intervals(cells, subject)
    return Findings(tuple(runs), tuple(cells), subject)


def _subject(cells: Sequence[Cell], against: str | None) -> str | None:
    points = {(i, p.contender, p.ratio) for i, cell in enumerate(cells) for p in cell.points}
    return subject_of((contender for _, contender, _ in points), against)
