"""What a study does next: the most telling run that can be done now, and no work twice."""

from __future__ import annotations

import fnmatch
from typing import Any

from cprec_recbole.compare.findings.runs import RUNS
from cprec_recbole.compare.results import QUALITY
from cprec_recbole.compare.study.ledger import Ledger, original_of
from cprec_recbole.compare.study.recipes import (
    Planning,
    Recipe,
    Trial,
    Work,
    recipe_without_ratio,
)
from cprec_recbole.compare.study.spec import Goal, Spec
from cprec_recbole.compare.study.store import PLANS, TRIALS, Store
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
        self.ledger = Ledger(spec, store)
        self.goals = wanted(spec, only)
        self.open = [goal for goal in self.goals if not self.ledger.is_settled(goal)]
        self.dropped: list[Goal] = []  # no other model than the compressed one
        self.running: set[str] = set()
        self._changes = 0

    @property
    def finished(self) -> int:
        """How many of the wanted runs are finished, failed or left out."""
        return len(self.goals) - len(self.open)

    def next(self) -> Work | None:
        """The next piece of work, which is `running` from now on; None where all that is left waits
        for what is running, or nothing is left."""
        before = -1
        while before != self._changes:  # others may have waited for what was settled
            before = self._changes
            for goal in list(self.open):
                step = self._step(goal)
                if step is True:
                    self.open.remove(goal)
                    self._changes += 1
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
        self.ledger.forget(TRIALS, work.key)
        if error is None:
            return
        if isinstance(work, Planning):
            known = self.store.read(PLANS, work.key) or {}  # of contenders that were there before
            failed = {name: {"error": error} for name in work.contenders}
            self.store.write(PLANS, work.key, failed | known)
        else:
            self.store.write(TRIALS, work.key, {"error": error})

    def _step(self, goal: Goal) -> Work | bool:
        """Work that brings a run nearer; True where it is settled, False where it has to wait."""
        if self.ledger.is_settled(goal):
            return True
        planned = self._recipe(goal)
        if not isinstance(planned, Recipe):
            return planned
        original, source = original_of(goal), None
        if original is not None:
            run = self.ledger.read(RUNS, original.key)
            if run is None or not self.ledger.is_settled(original):
                return False
            if "error" in run:
                return self._fail(goal, planned, f"there is no {original.key}: {run['error']}")
            source = self.ledger.source(original)
        rates = self._rates(goal)
        if isinstance(rates, bool):
            return rates
        if isinstance(rates, str):
            return self._fail(goal, planned, rates)
        trials = [
            Trial(goal.cell, planned, rate, goal.seed, goal.contender, goal.ratio, source)
            for rate in rates
        ]
        records = [self.ledger.known(goal, trial) for trial in trials]
        missing = [trial for trial, record in zip(trials, records) if record is None]
        if missing and original is not None and not self.ledger.has_weights(original):
            return self._wait_for_weights(original, goal, planned)
        for trial in missing:
            if trial.key not in self.running:
                return trial
        if missing:
            return False
        return self._conclude(goal, trials, [record for record in records if record is not None])

    def _wait_for_weights(self, original: Goal, goal: Goal, recipe: Recipe) -> bool:
        """Have an uncompressed model trained again whose run is there without its weights, as in a
        folder that was published."""
        failed = self.ledger.read(TRIALS, self.ledger.weights_key(original)) or {}
        if "error" in failed:
            return self._fail(goal, recipe, f"there is no {original.key}: {failed['error']}")
        self.ledger.again.add(original)
        self._changes += 1
        if original not in self.open:
            self.open.insert(0, original)
        return False

    def _recipe(self, goal: Goal) -> Recipe | Work | bool:
        """How the contender is made; or the planning that has to come first."""
        if goal.ratio is None:
            return recipe_without_ratio(self.spec, goal.contender)
        work = Planning(goal.cell, goal.ratio, self.spec.with_ratio)
        plan = self.ledger.read(PLANS, work.key)
        if plan is None or goal.contender not in plan:  # contenders may have been added
            self.ledger.forget(PLANS, work.key)
            return False if work.key in self.running else work
        entry = plan[goal.contender]
        if "same" in entry:
            self.dropped.append(goal)
            return True
        if "error" in entry:
            return self._fail(goal, None, entry["error"])
        # what was chosen for the first seed stays, also where a plan is made again by other code
        made = self.ledger.read(RUNS, self.ledger.first(goal).key) or {}
        chosen = made["options"] if "valid" in made else entry["options"]
        return Recipe(entry["kind"], chosen)

    def _rates(self, goal: Goal) -> tuple[float | None, ...] | bool | str:
        """The rates of a run: all for the first seed, the best of those for the others; False where
        the search is not finished, a text where it found none."""
        first = self.ledger.first(goal)
        if goal == first:  # a rate that is in the study no more may still be the best of its runs
            rates = self.spec.rates(goal.contender)
            kept = (self.ledger.read(RUNS, goal.key) or {}).get("learning_rate")
            return rates if kept is None or kept in rates else (*rates, kept)
        run = self.ledger.read(RUNS, first.key)
        if run is None or not self.ledger.is_settled(first):
            return False
        if "error" in run:
            return str(run["error"])
        return (run["learning_rate"],)

    def _conclude(self, goal: Goal, trials: list[Trial], records: list[dict[str, Any]]) -> bool:
        """Keep the best trial as the run."""
        kept = self.ledger.read(RUNS, goal.key) or {}
        if goal in self.ledger.again:
            self.ledger.again.discard(goal)
            if any(
                "error" in r for t, r in zip(trials, records) if t.rate == kept["learning_rate"]
            ):
                return True  # what was there is not lost
        whole = [(trial, record) for trial, record in zip(trials, records) if "valid" in record]
        if not whole:
            tried = [trial.rate for trial in trials if trial.rate is not None]
            return self._fail(goal, trials[0].recipe, records[0]["error"], tried)
        trial, best = max(whole, key=lambda pair: pair[1]["valid"][QUALITY])
        first = self.ledger.first(goal)
        if goal == first:
            search = [
                {"learning_rate": trial.rate, "valid": _reached(record)}
                for trial, record in zip(trials, records)
                if trial.rate is not None
            ]
        else:
            search = (self.ledger.read(RUNS, first.key) or {}).get("search", [])
        record = {k: v for k, v in best.items() if k != "seconds"}
        if trial.source_name is not None:
            record["source"] = trial.source_name
        record = {**self._head(goal), **record, "search": search, "command": self._repeat(goal)}
        is_kept = best is kept  # with its users' file
        self._keep(goal, record, None if is_kept else trial.key)
        return True

    def _fail(
        self, goal: Goal, recipe: Recipe | None, error: str, tried: list[float] | None = None
    ) -> bool:
        options = {} if recipe is None else recipe.options
        record: dict[str, Any] = {"options": options, "command": self._repeat(goal)}
        record["error"] = error
        if tried:
            record["search"] = [{"learning_rate": rate, "valid": None} for rate in tried]
        self._keep(goal, {**self._head(goal), **record}, None)
        return True

    def _keep(self, goal: Goal, record: dict[str, Any], trial: str | None) -> None:
        self.store.conclude(goal.key, record, trial)
        self.ledger.forget(RUNS, goal.key)
        done = {*self.open, *self.dropped}
        self.open += [g for g in self.goals if g not in done and not self.ledger.is_settled(g)]

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


def _reached(record: dict[str, Any]) -> float | None:
    """What a rate reached on validation; None where its training failed."""
    return record["valid"][QUALITY] if "valid" in record else record.get("lost")


def wanted(spec: Spec, only: list[str] | None) -> list[Goal]:
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
            if (
                original := original_of(Goal(goal.cell, goal.contender, goal.ratio, seed))
            ) is not None:
                needed.add(original)
    return [goal for goal in goals if goal in needed]
