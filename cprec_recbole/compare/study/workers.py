"""Processes that do pieces of work, one each at a time, and are told what to do over a pipe."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from cprec_recbole.compare.results import in_a_line
from cprec_recbole.compare.study.recipes import Work
from cprec_recbole.compare.study.spec import Spec
from cprec_recbole.compare.study.store import Store
from cprec_recbole.compare.study.work import do
from cprec_recbole.parallel import launch as processes

_SECONDS_TO_END = 5


@dataclass(frozen=True)
class News:
    """What a process says: an epoch of its work, or that it has ended.

    Attributes:
        work: the piece of work.
        epoch: epoch, counted from 1, and validation score.
        ended: it is finished, or has failed.
        error: why it failed, in a line.
    """

    work: Work
    epoch: tuple[int, float] | None = None
    ended: bool = False
    error: str | None = None


@dataclass
class _Worker:
    process: BaseProcess
    pipe: connection.Connection
    work: Work | None = field(default=None)


class Workers:
    """A few processes, each with one thread. One that dies is replaced, its work has failed.

    Args:
        jobs: how many.
        spec: the study.
        folder: its folder.
        data_path: where data sets are; None for RecBole's own place.
    """

    def __init__(self, jobs: int, spec: Spec, folder: Path, data_path: str | None) -> None:
        self.arguments = spec, folder, data_path
        self.context = multiprocessing.get_context(processes.START_METHOD)
        self.jobs = jobs
        self.workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(_SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done."""
        return all(worker.work is None for worker in self.workers)

    @property
    def has_room(self) -> bool:
        """Whether another piece of work can begin."""
        return len(self.workers) < self.jobs or any(w.work is None for w in self.workers)

    def begin(self, work: Work) -> None:
        """Give work to a process that has none; it is started where that is needed."""
        for free in [worker for worker in self.workers if worker.work is None]:
            try:
                free.pipe.send(work)
            except OSError:  # it died while it had nothing to do
                self.workers.remove(free)
                free.process.join()
                continue
            free.work = work
            return
        started = self._start()
        started.work = work
        started.pipe.send(work)

    def news(self) -> Iterator[News]:
        """Wait until a process has something to say."""
        by_pipe: dict[Any, tuple[_Worker, Work]] = {
            w.pipe: (w, w.work) for w in self.workers if w.work is not None
        }
        for pipe in connection.wait(list(by_pipe)):
            worker, work = by_pipe[pipe]
            try:
                kind, content = worker.pipe.recv()
            except (EOFError, OSError):
                self.workers.remove(worker)
                worker.process.join()
                yield News(work, ended=True, error=_death(worker.process.exitcode))
                continue
            if kind == "epoch":
                yield News(work, epoch=content)
            else:
                worker.work = None
                yield News(work, ended=True, error=content)

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(  # type: ignore[attr-defined]
            target=_live, args=(theirs, *self.arguments), daemon=True
        )
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker


def _live(pipe: connection.Connection, spec: Spec, folder: Path, data_path: str | None) -> None:
    """A process: do what the pipe says until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends us
    processes.end_with_parent()
    torch.set_num_threads(1)
    store = Store(folder, tidy=False)
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            return
        pipe.send(("ended", attempt(work, spec, store, data_path, pipe)))


def attempt(
    work: Work, spec: Spec, store: Store, data_path: str | None, pipe: Any = None
) -> str | None:
    """Do a piece of work; returns why it failed, in a line, or None."""

    def on_epoch(epoch: int, score: float) -> None:
        if pipe is not None:
            pipe.send(("epoch", (epoch + 1, score)))

    try:
        do(work, spec, store, data_path, on_epoch)
    except Exception as error:
        return in_a_line(error)
    return None


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        reason = ", as a system does that runs out of memory" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{reason}"
    return f"the process left with exit code {code}"
