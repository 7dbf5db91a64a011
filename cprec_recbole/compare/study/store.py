"""The folder of a study: what is finished lies there, whole, and is never done again."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cprec_recbole.compare.findings.runs import RUNS
from cprec_recbole.compare.study.recipes import Planning
from cprec_recbole.compare.study.spec import Goal, Spec
from cprec_recbole.config import CompressionError
from cprec_recbole.files import make_folder, write_whole

TRIALS, PLANS, WEIGHTS = "trials", "plans", "weights"
DATA = "data"  # which interactions the runs of a cell are of
UNFINISHED = "unfinished"


class Store:
    """Plans, trials (a training each), runs (the trials that count) and weights, as files.

    Args:
        folder: made where it is missing.
        tidy: remove what processes that were killed left half written; no other process may be at
            work there.
    """

    def __init__(self, folder: Path, *, tidy: bool = True) -> None:
        self.folder = folder
        for name in (RUNS, TRIALS, PLANS, WEIGHTS):
            make_folder(folder / name)
            for left in (folder / name).glob(".*.tmp") if tidy else ():
                left.unlink(missing_ok=True)
        for state in (folder / UNFINISHED).glob("*") if tidy else ():
            if "error" not in (self.read(TRIALS, state.name) or {"error": "none yet"}):
                shutil.rmtree(state, ignore_errors=True)

    def agree(self, spec: Spec) -> None:
        """Note what all runs of this folder have in common, or compare it with what was noted.

        Raises:
            CompressionError: the runs that are there were made with other options.
        """
        path, wanted = self.folder / "study.json", json.loads(json.dumps(spec.must_agree()))
        known = read_json(path) if path.exists() else {}
        if not any(any((self.folder / kind).glob("*.json")) for kind in (RUNS, TRIALS)):
            known = {}  # nothing was made yet: what was wrong in the file may be mended
        elif not known:
            warnings.warn(
                f"{self.folder} holds runs but no study.json: nothing says whether they were made "
                "with these options.",
                stacklevel=2,
            )
        for name, value in known.items():
            if name == "learning_rates" and set(value) <= set(wanted[name]):
                continue  # runs are searched on at those that were added
            if wanted.setdefault(name, value) != value:
                added = "name these too, or " if name == "learning_rates" else ""
                raise CompressionError(
                    f"Expected `{name}` to be {value}, with which the runs in {self.folder} were "
                    f"made, but got {wanted[name]}; {added}use another --out."
                )
        if wanted != known:  # settings have been added
            write_json(path, wanted)

    def path(self, kind: str, key: str, suffix: str = ".json") -> Path:
        """Where a file is: `kind` is one of `runs`, `trials`, `plans`, `weights`."""
        return self.folder / kind / f"{key}{suffix}"

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """A plan, trial or run; None where there is none yet."""
        path = self.path(kind, key)
        return read_json(path) if path.exists() else None

    def write(self, kind: str, key: str, record: dict[str, Any]) -> None:
        """Keep a plan, trial or run."""
        write_json(self.path(kind, key), record)

    def same_rows(self, cell: str, digest: str) -> None:
        """Note of which interactions a cell's runs are, or compare them with what was noted.

        Raises:
            CompressionError: other ones than those of the runs that are there.
        """
        make_folder(self.folder / DATA)
        known = self.read(DATA, cell)
        if known is None:
            self.write(DATA, cell, {"rows": digest})
        elif known["rows"] != digest:
            raise CompressionError(
                f"Expected `data_path` to hold the interactions of which the runs of {cell} in "
                f"{self.folder} are, but they have changed, or version 0.1 ordered them by rounded "
                "times; use another --out, or restore them and add --retry."
            )

    @contextmanager
    def unfinished(self, key: str) -> Iterator[Path]:
        """Where a trial may keep the state of its training; removed once it has ended, or failed
        for what would make it fail again, and left where it was interrupted."""
        folder = self.folder / UNFINISHED / key
        try:
            yield folder
        except ValueError:  # a loss that is no number, or options that cannot be
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)

    def write_users(self, key: str, values: np.ndarray) -> None:
        """Keep each test user's NDCG@20 of a trial, `[users]` of float32."""

        def write(file: Path) -> None:
            with file.open("wb") as stream:
                np.save(stream, values, allow_pickle=False)

        write_whole(self.path(TRIALS, key, ".npy"), write)

    def conclude(self, key: str, record: dict[str, Any], trial: str | None) -> None:
        """Keep a run, with the users' file of the trial that it is; that file first."""
        if trial is not None:
            source = self.path(TRIALS, trial, ".npy")
            write_whole(self.path(RUNS, key, ".npy"), lambda to: shutil.copyfile(source, to))
        self.write(RUNS, key, record)

    def forget_failures(self, goals: Sequence[Goal]) -> None:
        """Remove what failed of some runs, so that it is tried again: the runs, their trainings and
        plans, and learning rates that failed where another one did not."""
        for goal in goals:
            run = self.read(RUNS, goal.key) or {}
            if "error" in run:
                self.path(RUNS, goal.key).unlink()
            elif any(tried["valid"] is None for tried in run.get("search", [])):
                search = [tried for tried in run["search"] if tried["valid"] is not None]
                self.write(RUNS, goal.key, {**run, "search": search})
        for place, seed in {(str(goal.cell), goal.seed) for goal in goals}:
            for path in (self.folder / TRIALS).glob(f"{place}_*_s{seed}.json"):
                if "error" in read_json(path):
                    path.unlink()
        for cell, ratio in {(goal.cell, goal.ratio) for goal in goals if goal.ratio is not None}:
            key = Planning(cell, ratio, ()).key
            names = {goal.contender for goal in goals if (goal.cell, goal.ratio) == (cell, ratio)}
            plan = self.read(PLANS, key)
            if plan is not None:
                self.write(
                    *(PLANS, key),
                    {n: each for n, each in plan.items() if n not in names or "error" not in each},
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a CompressionError that names the file where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompressionError(f"Expected {path} to hold JSON, but got {error}.") from error
    if not isinstance(found, dict):
        raise CompressionError(f"Expected {path} to hold an object, but got {type(found)}.")
    return found


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write an object beside its place and rename it."""
    text = json.dumps(record, indent=1, allow_nan=False, default=str) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it."""
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))
