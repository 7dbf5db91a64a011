"""What is on record in a study, and whether it is what the study asks for today."""

from __future__ import annotations

from typing import Any

from cprec_recbole.compare.findings.intervals import load_users
from cprec_recbole.compare.findings.runs import RUNS
from cprec_recbole.compare.results import QUALITY, UNCOMPRESSED
from cprec_recbole.compare.study.recipes import Source, Trial, recipe_without_ratio
from cprec_recbole.compare.study.spec import Goal, Spec, is_derived
from cprec_recbole.compare.study.store import TRIALS, WEIGHTS, Store


class Ledger:
    """The records of a study's folder, each read once.

    Args:
        spec: the study.
        store: its folder.

    Attributes:
        again: uncompressed models that are trained once more, since their weights are not there.
    """

    def __init__(self, spec: Spec, store: Store) -> None:
        self.spec, self.store = spec, store
        self.again: set[Goal] = set()
        self._cache: dict[tuple[str, str], dict[str, Any]] = {}
        self._users: set[tuple[str, str]] = set()  # files that can be read

    def forget(self, kind: str, key: str) -> None:
        """Read a record anew: it has been written."""
        self._cache.pop((kind, key), None)

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """A plan, trial or run; None where there is none yet."""
        if (kind, key) not in self._cache:
            record = self.store.read(kind, key)
            if record is None:
                return None
            self._cache[kind, key] = record
        return self._cache[kind, key]

    def is_settled(self, goal: Goal) -> bool:
        """Whether a run is on record, of the rates and the original that the study has today: rates
        may have been added, and with them another original may have become the best."""
        run = self.read(RUNS, goal.key)
        if run is None or goal in self.again:
            return False
        first, original = self.first(goal), original_of(goal)
        if "error" in run:
            return self._is_failed_today(run, goal, first, original)
        if not self.has_users(RUNS, goal.key):
            return False
        if original is not None:
            source = self.source(original)
            if not self.is_settled(original) or (source and source.name) != run.get("source"):
                return False
        if goal == first:
            return self._has_all_rates(run, goal)
        searched = self.read(RUNS, first.key)
        if searched is None or not self.is_settled(first):
            return False
        return "error" in searched or all(
            run[name] == searched[name] for name in ("learning_rate", "search")
        )

    def _is_failed_today(
        self, run: dict[str, Any], goal: Goal, first: Goal, original: Goal | None
    ) -> bool:
        """Whether a failure stands: rates may have been added with which it, or what it waited for,
        has come to something."""
        if original is not None and original.key in run["error"]:  # it waited for that
            made = self.read(RUNS, original.key) or {}
            weights = self.read(TRIALS, self.weights_key(original)) or {}
            if "error" not in made and "error" not in weights:
                return False
        if goal == first:
            return "search" not in run or self._has_all_rates(run, goal)
        searched = self.read(RUNS, first.key) or {}
        if not self.is_settled(first):
            return False
        tried = {trial["learning_rate"] for trial in run.get("search", [])}
        return "error" in searched or tried >= {searched["learning_rate"]} - {None}

    def _has_all_rates(self, run: dict[str, Any], goal: Goal) -> bool:
        tried = {trial["learning_rate"] for trial in run["search"]}
        return tried >= set(self.spec.rates(goal.contender)) - {None}

    def has_users(self, kind: str, key: str) -> bool:
        """Whether each test user's figure lies beside a run or trial, and can be read."""
        if (kind, key) not in self._users:
            try:
                load_users(self.store.path(kind, key, ".npy"))
            except ValueError:
                return False
            self._users.add((kind, key))
        return True

    def known(self, goal: Goal, trial: Trial) -> dict[str, Any] | None:
        """The record of a training; where that was not kept, what the goal's run says of it: all,
        if the run is that training, or else what its search reached."""
        run = self.read(RUNS, goal.key) or {}
        has_run = "valid" in run and run.get("source") == trial.source_name
        is_run = has_run and run["learning_rate"] == trial.rate
        record = self.read(TRIALS, trial.key)
        if record is not None and "error" not in record and not self.has_users(TRIALS, trial.key):
            record = None
        if is_run and goal in self.again and not self.has_weights(goal):
            return record if record and "error" in record else None
        if record is not None:
            return record
        if is_run:
            return run if self.has_users(RUNS, goal.key) else None
        for tried in run["search"] if has_run and goal == self.first(goal) else ():
            if tried["learning_rate"] == trial.rate:
                return {"lost": tried["valid"]}
        return None

    def source(self, original: Goal) -> Source | None:
        """The training that the run of an uncompressed model is; None where there is none."""
        run = self.read(RUNS, original.key) or {}
        if "valid" not in run:
            return None
        return Source(self.weights_key(original), run["best_epoch"], run["valid"][QUALITY])

    def weights_key(self, original: Goal) -> str:
        """The name of the training whose weights the run of an uncompressed model has."""
        plain, run = recipe_without_ratio(self.spec, UNCOMPRESSED), self.read(RUNS, original.key)
        return plain.trial_key(original.cell, (run or {}).get("learning_rate"), original.seed)

    def has_weights(self, original: Goal) -> bool:
        """Whether those weights are there."""
        return self.store.path(WEIGHTS, self.weights_key(original), ".safetensors").exists()

    def first(self, goal: Goal) -> Goal:
        """The run with which the learning rate is searched."""
        return Goal(goal.cell, goal.contender, goal.ratio, self.spec.seeds[0])


def original_of(goal: Goal) -> Goal | None:
    """The run of the uncompressed model that a contender is made of; None for all others."""
    return Goal(goal.cell, UNCOMPRESSED, None, goal.seed) if is_derived(goal.contender) else None
