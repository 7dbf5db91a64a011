"""Running a study: every trial that can be done now is handed out, until none is left."""

from __future__ import annotations

import json
import multiprocessing
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cprec_recbole.compare import contenders
from cprec_recbole.compare.contenders import (
    STOCK,
    UNCOMPRESSED,
    UNCOMPRESSED_RECIPE,
    Recipe,
    Setting,
)
from cprec_recbole.compare.results import STUDY, TRIALS, read_study, read_trial, read_trials
from cprec_recbole.compare.spec import QUALITY, Cell, Goal, Record, Spec, Study, Trial, scheme_of
from cprec_recbole.compare.trial import (
    WEIGHTS,
    Data,
    OnEpoch,
    config_of,
    run_trial,
    weights_of,
    write_record,
)
from cprec_recbole.compression.compress import compress
from cprec_recbole.config import CompressionConfig, CompressionError, check_whole, reject_unknown
from cprec_recbole.costs import part_sizes
from cprec_recbole.environment import in_a_line
from cprec_recbole.files import held, make_folder, write_text
from cprec_recbole.host.library import known_options
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.parallel.launch import START_METHOD, end_with_parent
from cprec_recbole.training.evaluation import check_metrics, check_valid_metric

_SECONDS_BETWEEN_LOOKS = 0.2  # at what trainings say
_said: Any = None  # in a process of ours: what it says to the first one
_ENDED = "its process was ended, as a system does that runs out of memory"


@dataclass
class Outcome:
    """What became of the runs that were wanted."""

    study: Study  # what was asked for, and what its contenders are
    goals: list[Goal]  # the runs
    failed: dict[Goal, str]  # those of them that failed, and why
    dropped: list[Goal]  # others that would be the same model as `compressed`


def run_study(
    spec: Spec,
    folder: Path,
    *,
    jobs: int = 1,
    data_path: str | None = None,
    command: str = "",
    only: list[str] | None = None,
    retry: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Do all trials of a study that are not in its folder yet. Each is a file as soon as it is
    finished: an interruption loses the epochs, and the recoveries, that are in progress.

    Args:
        jobs: trials at a time, one thread each; 1 works in this process.
        data_path: where data sets are, as RecBole's option; None for RecBole's own place.
        command: what to write down as the way to repeat this.
        only: patterns of keys of runs; None for all. What these need is done too.
        retry: try again what failed.
        console: where progress is shown.

    Raises:
        CompressionError: options that RecBole refuses or that leave nothing to measure, data that
            are missing or other ones than before, a folder that another study writes to.
    """
    check_whole("jobs", jobs)
    goals = _wanted(spec, only)
    _check(spec, list(dict.fromkeys(goal.cell for goal in goals)), data_path)
    make_folder(folder)
    with held(folder):
        for kind in (TRIALS, WEIGHTS):
            make_folder(folder / kind)
            for left in (folder / kind).glob(".*.tmp"):
                left.unlink(missing_ok=True)
        study = _planned(spec, goals, folder, data_path, retry, command)
        dropped = [goal for goal in goals if study.made(goal) is None]
        goals = [goal for goal in goals if study.made(goal) is not None]
        work = _Work(study, folder, goals, read_trials(folder))
        if retry:
            work.forget_failures()
        display = _Display(console or Console(), work)
        with display.progress:
            _work_on(work, jobs, data_path, display)
        ends = {goal: study.state(goal, work.found).error for goal in goals}
        return Outcome(study, goals, {g: why for g, why in ends.items() if why}, dropped)


@dataclass
class _Work:
    """What there is to do, computed anew from what was found whenever that changes."""

    study: Study
    folder: Path
    goals: list[Goal]
    found: dict[str, Record]
    running: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)  # why an original has no weights
    finished: int = 0  # of the goals

    def next(self, room: int) -> list[tuple[Trial, Record | None]]:
        """Trials that can begin now, and what each is made of."""
        ahead = [self._ahead(goal) for goal in self.goals]
        self.finished = sum(not trials for trials in ahead)
        found = {trial.name: trial for trials in ahead for trial in trials}
        free = [trial for name, trial in found.items() if name not in self.running][:room]
        self.running |= {trial.name for trial in free}
        return [(trial, self.found[trial.parent[0]] if trial.parent else None) for trial in free]

    def _ahead(self, goal: Goal) -> list[Trial]:
        """The trials that bring a run nearer."""
        found = []
        for trial in self.study.state(goal, self.found).missing:
            parent = trial.parent and trial.parent[0]
            if parent is None or weights_of(self.folder, parent).exists():
                found.append(trial)
            elif parent in self.lost:
                self.end(trial, f"there is no {parent}: {self.lost[parent]}")
            else:  # it was not kept, as in a folder that was published
                original = self.study.state(goal.original._replace(seed=trial.seed), self.found)
                found += [original.best[0]] if original.best else []
        return found

    def end(self, trial: Trial, error: str | None) -> Record:
        """Note that a trial has ended, or why it failed; gives what was found."""
        self.running.discard(trial.name)
        if error is None:
            self.found[trial.name] = read_trial(self.folder / TRIALS / f"{trial.name}.json")
            return self.found[trial.name]
        if "error" not in self.found.get(trial.name, {"error": ""}):
            self.lost[trial.name] = error  # what was there is not lost
        else:
            self.found[trial.name] = {"error": error}
            write_record(self.folder, trial, {"error": error})
        return {"error": error}

    def forget_failures(self) -> None:
        """Forget what failed of the runs that are wanted."""
        for goal in self.goals:
            for trial, record in self.study.state(goal, self.found).tried:
                if "error" in record:
                    del self.found[trial.name]


def _wanted(spec: Spec, only: list[str] | None) -> list[Goal]:
    """The runs that patterns name."""
    goals = spec.goals()
    for pattern in only or ():
        if not any(fnmatchcase(goal.key, pattern) for goal in goals):
            raise CompressionError(
                f"Expected `only` to be a pattern of keys such as {goals[0].key}, but got "
                f"{pattern!r}, which none has."
            )
    return [g for g in goals if only is None or any(fnmatchcase(g.key, p) for p in only)]


def _check(spec: Spec, cells: list[Cell], data_path: str | None) -> None:
    """Whether RecBole takes what is asked for, before anything is trained."""
    known: set[str] = set()
    for cell in cells:
        config = config_of(cell, spec.options, data_path)
        known.update(known_options(config))
        for name in ("epochs", "eval_step"):
            check_whole(name, config[name])
        check_valid_metric(config)
        check_metrics(config, "metrics")
        measured = [f"{m}@{k}".lower() for m in config["metrics"] for k in config["topk"]]
        if QUALITY not in measured:
            raise CompressionError(
                f"Expected `metrics` and `topk` to measure NDCG@20, but got {', '.join(measured)}."
            )
        mode = config["eval_args"]["mode"]
        if (set(mode.values()) if isinstance(mode, dict) else {mode}) != {"full"}:
            raise CompressionError(
                f"Expected `eval_args` to rank all items (mode: full), but got mode {mode}."
            )
        if STOCK in spec.contenders:  # RecBole may refuse for it what it takes for ours
            config_of(cell, spec.options, data_path, recipe=Recipe(contenders.STOCK_KIND, {}))
    reject_unknown(spec.options, sorted(known))


def _planned(
    spec: Spec, goals: list[Goal], folder: Path, data_path: str | None, retry: bool, command: str
) -> Study:
    """The study with a plan of each cell, as it is written into the folder. What was planned stays:
    the seeds of a contender are one model, whatever later code would choose."""
    file = folder / STUDY
    plans = read_study(folder).plans if file.exists() else {}
    asked = json.loads(json.dumps({"options": spec.options, "compression": spec.compression}))
    for cell in dict.fromkeys(goal.cell for goal in goals):
        before = plans.get(str(cell), {})
        is_same = before.get("asked") == asked
        known = before["contenders"] if is_same else {}
        known = {name: made for name, made in known.items() if not (retry and type(made) is str)}
        wanted = {goal.name: goal for goal in goals if goal.cell == cell}
        wanted[UNCOMPRESSED] = Goal(cell, UNCOMPRESSED, None, spec.seeds[0])
        new = [goal for name, goal in wanted.items() if name not in {*known, *spec.settings}]
        if new:
            plan = plan_cell(spec, cell, new, data_path, before["rows"] if is_same else None)
            plans[str(cell)] = {**plan, "asked": asked, "contenders": known | plan["contenders"]}
        for name, options in spec.settings.items():
            kind = "recjpq-hc" if "recjpq_codes" in options else "train"
            plans[str(cell)]["contenders"][name] = asdict(Recipe(kind, options))
    whole = {"command": command, "spec": asdict(spec), "cells": plans}
    write_text(file, json.dumps(whole, indent=1, default=str) + "\n")
    return Study(spec, plans, command)


def plan_cell(
    spec: Spec, cell: Cell, wanted: list[Goal], data_path: str | None, rows: str | None = None
) -> dict[str, Any]:
    """What contenders are in a cell, see Study, whose interactions are to have this checksum."""
    config = config_of(cell, spec.options, data_path, seed=spec.seeds[0])
    data = Data.of(config)
    data.check_rows(cell, rows or data.rows)
    fresh = contenders.build(UNCOMPRESSED_RECIPE, config, data.train._dataset)
    same = compression_of(config)
    shared = {name: getattr(same, name) for name in contenders.SHARED_OPTIONS}

    @cache
    def setting_of(ratio: float | None, scheme: str | None) -> tuple[Setting, str | None]:
        """What a ratio, or the options that were given, come to; and why that cannot be."""
        base = spec.compression if scheme is None else {**spec.compression, "sharing": scheme}
        chosen, size, refused = CompressionConfig(**base), None, None
        if ratio is not None:
            try:
                chosen = compress(fresh, ratio=ratio, verbose=False, **base).compression
            except CompressionError as error:
                size, refused = int(part_sizes(fresh).total / ratio), str(error)
        chosen = replace(chosen, **shared)
        return Setting(config, data.dataset, chosen, ratio, base, size), refused

    def recipe_of(goal: Goal) -> dict[str, Any] | str | None:
        name, scheme = goal.contender, scheme_of(goal.contender)
        setting, refused = setting_of(goal.ratio, scheme)
        if name == contenders.COMPRESSED and goal.ratio is None:  # what cannot be is said at once
            made = Recipe("train", contenders.own_options(setting.compression))
            own = config_of(cell, spec.options, data_path, recipe=made)
            contenders.build(made, own, data.dataset)
        if refused is not None and name not in contenders.BY_SIZE:
            return refused
        try:
            recipe = contenders.recipe_of(contenders.COMPRESSED if scheme else name, setting)
            if recipe is not None and recipe.is_derived and recipe.options.get("ratio"):
                given = {k: v for k, v in recipe.options.items() if k != "one_rank"}
                compress(fresh, verbose=False, **given)  # said before anything is trained
        except CompressionError as error:
            return str(error)
        return None if recipe is None else asdict(recipe)

    about = {
        "users": int(data.dataset.user_num) - 1,
        "items": int(data.dataset.item_num) - 1,
        "test_cases": len(data.test._dataset),
        "evaluation": config["eval_args"],
    }
    made = {goal.name: recipe_of(goal) for goal in wanted}
    return {"rows": data.rows, "about": about, "contenders": made}


def _attempt(
    say: OnEpoch, trial: Trial, parent: Record | None, folder: Path, data_path: str | None
) -> str | None:
    """Do a trial, with one thread, as in any number of processes: their number changes what is
    trained. Gives why it failed, in a line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_trial(trial, parent, folder, data_path, say)
    except Exception as error:
        return in_a_line(error)
    finally:
        torch.set_num_threads(threads)
    return None


class _Process:
    """A process of its own for a trial at a time, so that it alone is lost where it dies."""

    def __init__(self) -> None:
        context = multiprocessing.get_context(START_METHOD)
        # of its own: who dies while it writes must not keep others from writing
        self.said: Any = context.SimpleQueue()
        self.executor = ProcessPoolExecutor(1, context, _begin, (self.said,))

    def do(self, display: _Display, *given: Any) -> Future[str | None]:
        return self.executor.submit(_attempt_there, *given)


class _Here:
    """This process, as if it were another."""

    said: Any = multiprocessing.SimpleQueue()  # stays empty

    def do(self, display: _Display, trial: Trial, *given: Any) -> Future[str | None]:
        future: Future[str | None] = Future()
        future.set_result(_attempt(partial(display.epoch, trial), trial, *given))
        return future


def _begin(said: Any) -> None:
    global _said
    _said = said
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends us
    end_with_parent()


def _attempt_there(*given: Any) -> str | None:
    return _attempt(lambda *epoch: _said.put(epoch), *given)


def _work_on(work: _Work, jobs: int, data_path: str | None, display: _Display) -> None:
    """Hand out trials until none is left."""
    before = set(multiprocessing.active_children())
    free: list[_Process | _Here] = [_Process() if jobs > 1 else _Here() for _ in range(jobs)]
    busy: dict[Future[str | None], tuple[_Process | _Here, Trial]] = {}
    try:
        while True:
            for trial, parent in work.next(len(free)):
                display.begin(trial)
                process = free.pop()
                future = process.do(display, trial, parent, work.folder, data_path)
                busy[future] = process, trial
            display.progress.update(display.all, completed=work.finished)
            if not busy:
                return
            done, _ = wait(busy, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            for process, trial in busy.values():
                while not process.said.empty():
                    display.epoch(trial, *process.said.get())
            for future in done:
                process, trial = busy.pop(future)
                is_dead = isinstance(future.exception(), BrokenProcessPool)
                free.append(_Process() if is_dead else process)
                display.end(trial, work.end(trial, _ENDED if is_dead else future.result()))
    finally:
        for child in set(multiprocessing.active_children()) - before if busy else ():
            child.kill()


class _Display:
    """A bar for the study and one for each trial. On what is no terminal, a line for each trial
    that ends and, where one cell is compared, for each epoch."""

    def __init__(self, console: Console, work: _Work) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        more = TextColumn("{task.fields[note]}"), TimeElapsedColumn()
        self.console, is_log = console, not console.is_terminal
        self.progress = Progress(*columns, *more, console=console, disable=is_log)
        self.has_epochs = is_log and len({goal.cell for goal in work.goals}) == 1
        given = str(work.study.spec.options.get("epochs"))  # RecBole takes a text as well
        self.epochs = int(given) if given.isdecimal() else None
        self.all = self.progress.add_task("runs", total=len(work.goals), note="")
        self.bars: dict[str, Any] = {}
        work.next(0)
        self._line(f"{len(work.goals)} runs, {work.finished} of them finished before.")

    def begin(self, trial: Trial) -> None:
        self.bars[trial.name] = self.progress.add_task(trial.words, total=self.epochs, note="")

    def epoch(self, trial: Trial, epoch: int, score: float) -> None:
        note = f"valid {score:.4f}"
        self.progress.update(self.bars[trial.name], completed=epoch, note=note)
        if self.has_epochs:
            self._line(f"{trial.words}, epoch {epoch}: {note}")

    def end(self, trial: Trial, found: Record) -> None:
        self.progress.remove_task(self.bars.pop(trial.name))
        if "error" in found:
            self._line(f"{trial.words}: failed: {found['error']}")
        else:
            reached = f"valid {found['valid'][QUALITY]:.4f}, {found['epochs']} epochs"
            self._line(f"{trial.words}: {reached}, {found['seconds']:.0f} s")

    def _line(self, text: str) -> None:
        # a message may have brackets, which are rich's for colours
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)
