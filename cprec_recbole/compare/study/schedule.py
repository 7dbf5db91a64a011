"""What a study does next: the most telling run that can be done now, and no work twice."""

from __future__ import annotations

import fnmatch
from typing import Any

from cprec_recbole.compare.study.recipes import (
    QUALITY,
    Planning,
    Recipe,
    Trial,
    Work,
    recipe_without_ratio,
)
from cprec_recbole.compare.study.spec import UNCOMPRESSED, Goal, Spec, is_derived
from cprec_recbole.compare.study.store import PLANS, RUNS, TRIALS, WEIGHTS, Store
from cprec_recbole.config import CompressionError


class Schedule:
    """The runs that are wanted, what they wait for, and what became of them.

    Args:
        spec: the study.
        store: its folder.
        command: of a run's repetition, without its key.
        only: patterns of keys, as a shell's; what these runs need is done too. None: all.
    """

    def __init__(
        self, spec: Spec, store: Store, command: str, only: list[str] | None = None
    ) -> None:
        self.spec, self.store, self.command = spec, store, command
        self.goals = _wanted(spec, only)
        self.open = [goal for goal in self.goals if store.read(RUNS, goal.key) is None]
        self.dropped: list[Goal] = []  # no other model than the compressed one
        self.running: set[str] = set()
        self._cache: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def finished(self) -> int:
        """How many of the wanted runs are finished, failed or left out."""
        return len(self.goals) - len(self.open)

    def next(self) -> Work | None:
        """The next piece of work, which is `running` from now on; None where all that is left waits
        for what is running, or nothing is left."""
        for goal in list(self.open):
            step = self._step(goal)
            if step is True:
                self.open.remove(goal)
            elif isinstance(step, Work):
                self.running.add(step.key)
                return step
        return None

    def done(self, work: Work, error: str | None = None) -> None:
        """Note that a piece of work is finished, or why it failed.

        Args:
            work: what `next` gave.
            error: in a line.
        """
        self.running.discard(work.key)
        if error is None:
            return
        if isinstance(work, Planning):
            self.store.write(PLANS, work.key, {n: {"error": error} for n in work.contenders})
        else:
            self.store.write(TRIALS, work.key, {"error": error})

    def _read(self, kind: str, key: str) -> dict[str, Any] | None:
        if (kind, key) not in self._cache:
            record = self.store.read(kind, key)
            if record is None:
                return None
            self._cache[kind, key] = record
        return self._cache[kind, key]

    def _step(self, goal: Goal) -> Work | bool:
        """Work that brings a run nearer; True where it is settled, False where it has to wait."""
        planned = self._recipe(goal)
        if not isinstance(planned, Recipe):
            return planned
        source = None
        if is_derived(goal.contender):
            original = Goal(goal.cell, UNCOMPRESSED, None, goal.seed)
            run = self._read(RUNS, original.key)
            if run is None:
                return False
            if "error" in run:
                return self._fail(goal, planned, f"there is no {original.key}: {run['error']}")
            plain = recipe_without_ratio(self.spec, UNCOMPRESSED)
            key = plain.trial_key(goal.cell, run["learning_rate"], goal.seed)
            source = key, int(run["best_epoch"])
        rates = self._rates(goal)
        if isinstance(rates, bool):
            return rates
        if isinstance(rates, str):
            return self._fail(goal, planned, rates)
        trials = [
            Trial(goal.cell, planned, rate, goal.seed, goal.contender, goal.ratio, source)
            for rate in rates
        ]
        for trial in trials:
            if trial.key not in self.running and self._read(TRIALS, trial.key) is None:
                return trial
        records = [self._read(TRIALS, trial.key) for trial in trials]
        if any(record is None for record in records):
            return False
        return self._conclude(goal, trials, [record for record in records if record is not None])

    def _recipe(self, goal: Goal) -> Recipe | Work | bool:
        """How the contender is made; or the planning that has to come first."""
        if goal.ratio is None:
            return recipe_without_ratio(self.spec, goal.contender)
        work = Planning(goal.cell, goal.ratio, self.spec.with_ratio)
        plan = self._read(PLANS, work.key)
        if plan is None or goal.contender not in plan:  # contenders may have been added
            self._cache.pop((PLANS, work.key), None)
            return False if work.key in self.running else work
        entry = plan[goal.contender]
        if "same" in entry:
            self.dropped.append(goal)
            return True
        if "error" in entry:
            return self._fail(goal, None, entry["error"])
        return Recipe(entry["kind"], entry["options"])

    def _rates(self, goal: Goal) -> tuple[float | None, ...] | bool | str:
        """The rates of a run: all for the first seed, the best of those for the others; False where
        the search is not finished, a text where it found none."""
        first = self.spec.seeds[0]
        rates = self.spec.rates(goal.contender)
        if goal.seed == first:
            return rates
        searched = Goal(goal.cell, goal.contender, goal.ratio, first)
        run = self._read(RUNS, searched.key)
        if run is None:
            return False
        if "error" in run:
            return str(run["error"])
        return (run["learning_rate"],)

    def _conclude(self, goal: Goal, trials: list[Trial], records: list[dict[str, Any]]) -> bool:
        """Keep the best trial as the run."""
        ended = [(t, r) for t, r in zip(trials, records) if "error" not in r]
        if not ended:
            return self._fail(goal, trials[0].recipe, records[0]["error"])
        trial, best = max(ended, key=lambda pair: pair[1]["valid"][QUALITY])
        first = Goal(goal.cell, goal.contender, goal.ratio, self.spec.seeds[0])
        if goal == first:
            search = [
                {"learning_rate": t.rate, "valid": (r.get("valid") or {}).get(QUALITY)}
                for t, r in zip(trials, records)
                if t.rate is not None
            ]
        else:
            search = (self._read(RUNS, first.key) or {}).get("search", [])
        record = {k: v for k, v in best.items() if k != "seconds"}
        record = {**self._head(goal), **record, "search": search, "command": self._repeat(goal)}
        self.store.conclude(goal.key, record, trial.key)
        if goal.contender == UNCOMPRESSED:
            for loser in trials:
                if loser is not trial:
                    self.store.path(WEIGHTS, loser.key, ".safetensors").unlink(missing_ok=True)
        return True

    def _fail(self, goal: Goal, recipe: Recipe | None, error: str) -> bool:
        options = {} if recipe is None else recipe.options
        record = {"options": options, "command": self._repeat(goal), "error": error}
        self.store.conclude(goal.key, {**self._head(goal), **record}, None)
        return True

    def _head(self, goal: Goal) -> dict[str, Any]:
        return {
            "key": goal.key,
            "dataset": goal.cell.dataset,
            "model": goal.cell.model,
            "length": goal.cell.length,
            "seed": goal.seed,
            "contender": goal.contender,
            "ratio": goal.ratio,
        }

    def _repeat(self, goal: Goal) -> str:
        return f"{self.command} --only {goal.key}"


def _wanted(spec: Spec, only: list[str] | None) -> list[Goal]:
    """The runs that patterns name, and those that they need."""
    goals = list(spec.goals())
    if only is None:
        return goals
    needed: set[Goal] = set()
    for pattern in only:
        matching = [goal for goal in goals if fnmatch.fnmatchcase(goal.key, pattern)]
        if not matching:
            raise CompressionError(
                f"Expected `only` to be a pattern of keys such as {goals[0].key}, but got "
                f"{pattern!r}, which none has."
            )
        needed.update(matching)
    for goal in list(needed):
        for seed in (spec.seeds[0], goal.seed):
            needed.add(Goal(goal.cell, goal.contender, goal.ratio, seed))
            if is_derived(goal.contender):
                needed.add(Goal(goal.cell, UNCOMPRESSED, None, seed))
    return [goal for goal in goals if goal in needed]
