"""Running a study: work is handed out until none is left, and shown while it is done."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cprec_recbole.compare.results import QUALITY
from cprec_recbole.compare.study.checks import check
from cprec_recbole.compare.study.recipes import Planning, Work
from cprec_recbole.compare.study.schedule import Schedule, wanted
from cprec_recbole.compare.study.spec import Spec
from cprec_recbole.compare.study.store import TRIALS, Store
from cprec_recbole.compare.study.workers import Workers
from cprec_recbole.config import CompressionError, is_whole
from cprec_recbole.files import held, make_folder


def run_study(
    spec: Spec,
    folder: Path,
    *,
    jobs: int = 1,
    data_path: str | None = None,
    command: str = "cprec compare",
    only: list[str] | None = None,
    retry: bool = False,
    console: Console | None = None,
) -> Schedule:
    """Do all runs of a study that are not finished yet.

    Every finished training is a file at once. An interruption at any moment loses the epochs, and
    the recoveries, that are in progress and nothing else.

    Args:
        spec: the study.
        folder: where it is kept.
        jobs: trainings at a time, a process with one thread each.
        data_path: where data sets are, as RecBole's option; None for RecBole's own place.
        command: what repeats a run, but for its key.
        only: patterns of keys of runs; None for all.
        retry: try again what failed.
        console: where progress is shown.

    Returns:
        What became of each run.

    Raises:
        CompressionError: a folder of other options, or one that another study writes to.
    """
    if not is_whole(jobs) or jobs < 1:
        raise CompressionError(f"Expected `jobs` to be 1 or more, but got {jobs!r}.")
    check(spec, data_path)
    make_folder(folder)
    with held(folder):
        store = Store(folder)
        store.agree(spec)
        if retry:
            store.forget_failures(wanted(spec, only))
        schedule = Schedule(spec, store, command, only)
        with (
            _Display(schedule, console or Console()) as display,
            Workers(jobs, spec, folder, data_path) as workers,
        ):
            while True:
                while workers.has_room and (work := schedule.next()) is not None:
                    workers.begin(work)
                    display.begin(work)
                display.count()
                if workers.is_idle:
                    return schedule
                for news in workers.news():
                    if news.epoch is not None:
                        display.epoch(news.work, *news.epoch)
                    if news.ended:
                        schedule.done(news.work, news.error)
                        display.end(news.work, news.error)


_SECONDS_BETWEEN_LINES = 300  # of a training, on what is no terminal


class _Display:
    """A bar for the study and one for each training; on what is no terminal, a line for each that
    ends, and every few minutes one that says how far it is."""

    def __init__(self, schedule: Schedule, console: Console) -> None:
        self.schedule = schedule
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.print = console.print if not console.is_terminal else self.progress.console.print
        given = str(schedule.spec.options.get("epochs"))  # RecBole takes a text as well
        self.epochs = int(given) if given.isdecimal() else None
        self.all = self.progress.add_task("runs", total=len(schedule.goals), note="")
        self.bars: dict[str, TaskID] = {}
        self.began: dict[str, float] = {}
        self.said: dict[str, float] = {}  # when there was a line of it, on what is no terminal

    def __enter__(self) -> _Display:
        self.print(
            f"{len(self.schedule.goals)} runs, {self.schedule.finished} of them finished before."
        )
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(None, None, None)

    def begin(self, work: Work) -> None:
        self.began[work.key] = self.said[work.key] = monotonic()
        self.bars[work.key] = self.progress.add_task(work.words, total=self.epochs, note="")

    def epoch(self, work: Work, epoch: int, score: float) -> None:
        note = f"valid {score:.4f}"
        self.progress.update(self.bars[work.key], completed=epoch, note=note)
        if self.progress.disable and monotonic() - self.said[work.key] >= _SECONDS_BETWEEN_LINES:
            self.said[work.key] = monotonic()
            seconds = monotonic() - self.began[work.key]
            self._line(f"{work.words}: epoch {epoch}, {note}, {seconds:.0f} s so far")

    def end(self, work: Work, error: str | None) -> None:
        self.progress.remove_task(self.bars.pop(work.key))
        seconds = monotonic() - self.began.pop(work.key)
        self.said.pop(work.key)
        if error is not None:
            self._line(f"{work.words}: failed: {error}")
        elif not isinstance(work, Planning):
            record = self.schedule.store.read(TRIALS, work.key) or {}
            reached = f"valid {record['valid'][QUALITY]:.4f}, {record['epochs']} epochs"
            self._line(f"{work.words}: {reached}, {seconds:.0f} s")

    def count(self) -> None:
        self.progress.update(self.all, completed=self.schedule.finished)

    def _line(self, text: str) -> None:
        # a message may have brackets, which are rich's for colours
        self.print(text, highlight=False, soft_wrap=True, markup=False)
