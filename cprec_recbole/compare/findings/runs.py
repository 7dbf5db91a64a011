"""The runs of a study as they lie in its folder, checked field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cprec_recbole.compare.findings.records import Record, refusal
from cprec_recbole.compare.results import QUALITY, UNCOMPRESSED
from cprec_recbole.config import CompressionError

RUNS = "runs"  # in the folder of a study
_MACHINE = ("processor", "gpu", "torch_threads")  # of an environment: what times depend on


@dataclass(frozen=True)
class Trial:
    """One learning rate of a search, and what it reached on the validation set (None: nothing)."""

    learning_rate: float
    valid: float | None


@dataclass(frozen=True)
class StudyRun:
    """One contender, trained once on one data set; what was not measured is None or empty.

    Attributes:
        path: the file it came from; `<key>.npy` beside it holds each test user's NDCG@20.
        key: its name in the study.
        dataset: RecBole's name of the data set.
        model: RecBole's name of the model.
        length: items of a history.
        seed: seed of data order and weights.
        contender: its name in the study.
        ratio: how many times smaller it was to be; None for no such aim.
        options: what was set beside the defaults.
        learning_rate: the one that was trained with.
        search: learning rates tried before.
        parts: parameters by part.
        parameters: all parameters.
        bytes: bytes of the weights.
        test: metrics on the test set.
        valid_curve: the validation metric after each evaluation.
        curve_metric: which metric that is.
        eval_step: epochs from one evaluation to the next.
        best_epoch: the epoch whose weights were kept, counted from 1.
        epochs: epochs trained.
        epoch_seconds: seconds of each of them.
        score_ms: milliseconds to score the catalogue for one user.
        popularity: NDCG@20 of each group of items by popularity; None where it holds no case.
        cases: test cases of each of those groups.
        command: what repeats it.
        environment: versions and hardware.
        error: why it failed; None for a run that finished.
        content: all that its file holds.
        is_elsewhere: it was timed on another machine than the rest of its cell, and its times are
            left out.
    """

    path: Path
    key: str
    dataset: str
    model: str
    length: int | None
    seed: int | None
    contender: str
    ratio: float | None
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    search: tuple[Trial, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)
    parameters: float = math.nan
    bytes: float | None = None
    test: dict[str, float] = field(default_factory=dict)
    valid_curve: tuple[float, ...] = ()
    curve_metric: str | None = None
    eval_step: int | None = None
    best_epoch: float | None = None
    epochs: float | None = None
    epoch_seconds: tuple[float, ...] = ()
    score_ms: float | None = None
    popularity: dict[str, float | None] = field(default_factory=dict)
    cases: dict[str, float] = field(default_factory=dict)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    content: dict[str, Any] = field(default_factory=dict)
    is_elsewhere: bool = False

    @property
    def users_path(self) -> Path:
        """The file of each test user's NDCG@20."""
        return self.path.with_suffix(".npy")

    @property
    def machine(self) -> tuple[Any, ...]:
        """On what it was timed."""
        return tuple(self.environment.get(name) for name in _MACHINE)


def read_runs(folder: Path) -> list[StudyRun]:
    """All runs of a study, those that failed too, sorted by the names of their files.

    Args:
        folder: of a study; holds `runs/*.json`, a run each.

    Raises:
        CompressionError: no run, a file that is no JSON object, a field that is missing or of
            the wrong kind; the file is named.
    """
    runs = Path(folder) / RUNS
    files = [path for path in sorted(runs.glob("*.json")) if not path.name.startswith(".")]
    if not files:
        raise CompressionError(
            f"Expected `out` to be the folder of a study, but got no file {runs / '*.json'}; run "
            "it first with --study."
        )
    return [read_run(path) for path in files]


def with_comparable_times(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """The runs, those without their times that were timed on another machine than the uncompressed
    model of the same data, model and length (without one, than the lowest seed)."""
    machines: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    timed = [run for run in runs if run.score_ms is not None or run.epoch_seconds]
    for run in sorted(timed, key=lambda run: (run.contender != UNCOMPRESSED, run.seed or 0)):
        machines.setdefault(_cell(run), run.machine)
    elsewhere = {run.key for run in timed if run.machine != machines[_cell(run)]}
    return [
        replace(run, score_ms=None, epoch_seconds=(), is_elsewhere=True)
        if run.key in elsewhere
        else run
        for run in runs
    ]


def _cell(run: StudyRun) -> tuple[Any, ...]:
    return run.dataset, run.model, run.length


def read_run(path: Path) -> StudyRun:
    """One run; a CompressionError that names the file where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(path, "a run in JSON", str(error)) from None
    if not isinstance(content, dict):
        raise refusal(path, "a run as a JSON object", type(content).__name__)
    record = Record(path, content)
    about: dict[str, Any] = {
        "path": path,
        "key": record.text("key", path.stem),
        "contender": record.text("contender"),
        "dataset": record.text("dataset"),
        "model": record.text("model"),
        "length": record.whole("length"),
        "seed": record.whole("seed"),
        "ratio": record.number("ratio"),
        "options": record.mapping("options"),
        "command": record.text("command", ""),
        "environment": record.mapping("environment"),
        "content": content,
    }
    if content.get("error") is not None:
        return StudyRun(**about, error=str(content["error"]))
    return StudyRun(**about, **_results(record))


def _results(record: Record) -> dict[str, Any]:
    groups = record.mapping("popularity")
    popularity = {name: record.inside("popularity", name) for name in groups}
    return {
        "learning_rate": record.number("learning_rate"),
        "search": tuple(_trial(record, item) for item in record.items("search")),
        "parts": {k: v for k, v in record.numbers("parameters").items() if k != "total"},
        "parameters": record.needed(record.number("total_parameters"), "total_parameters"),
        "bytes": record.number("bytes"),
        "test": _metrics(record),
        "valid_curve": record.series("valid_curve"),
        "curve_metric": record.text("curve_metric", "") or None,
        "eval_step": record.whole("eval_step"),
        "best_epoch": record.number("best_epoch"),
        "epochs": record.number("epochs"),
        "epoch_seconds": record.series("epoch_seconds"),
        "score_ms": record.number("score_ms"),
        "popularity": {k: _of_a_case(group) for k, group in popularity.items()},
        "cases": {k: v for k, g in popularity.items() if (v := g.number("cases")) is not None},
    }


def _metrics(record: Record) -> dict[str, float]:
    metrics = record.numbers("test")
    record.needed(metrics.get(QUALITY), f"test.{QUALITY}")
    return metrics


def _of_a_case(group: Record) -> float | None:
    return None if group.number("cases") == 0 else group.number(QUALITY)


def _trial(record: Record, item: Any) -> Trial:
    trial = Record(record.path, item if isinstance(item, dict) else {})
    rate = trial.needed(trial.number("learning_rate"), "search.learning_rate")
    return Trial(rate, trial.number("valid"))
