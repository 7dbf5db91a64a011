"""What is on record in a study, and whether it is what the study asks for today."""

from __future__ import annotations

from typing import Any

from cprec_recbole.compare.findings.runs import RUNS
from cprec_recbole.compare.study.recipes import QUALITY, Source, Trial, recipe_without_ratio
from cprec_recbole.compare.study.spec import UNCOMPRESSED, Goal, Spec, is_derived
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
        if "error" in run:
            return True
        original = original_of(goal)
        if original is not None:
            source = self.source(original)
            if not self.is_settled(original) or (source and source.name) != run.get("source"):
                return False
        first = self.first(goal)
        if goal == first:
            tried = {trial["learning_rate"] for trial in run["search"]}
            return tried >= set(self.spec.rates(goal.contender)) - {None}
        searched = self.read(RUNS, first.key)
        if searched is None or not self.is_settled(first):
            return False
        return "error" in searched or all(
            run[name] == searched[name] for name in ("learning_rate", "search")
        )

    def known(self, goal: Goal, trial: Trial) -> dict[str, Any] | None:
        """The record of a training; where that was not kept, what the goal's run says of it: all,
        if the run is that training, or else what its search reached."""
        run = self.read(RUNS, goal.key) or {}
        has_run = "valid" in run and run.get("source") == trial.source_name
        is_run = has_run and run["learning_rate"] == trial.rate
        record = self.read(TRIALS, trial.key)
        if is_run and goal in self.again and not self.has_weights(goal):
            return record if record and "error" in record else None
        if record is not None:
            return record
        if is_run:
            return run
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
