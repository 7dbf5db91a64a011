"""Made-up studies: folders in the shape that a study keeps, seeded, of no meaning."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cprec_recbole.compare.contenders import Recipe
from cprec_recbole.compare.results import ORDER, STUDY, TRIALS, Findings, findings_of, pack_users
from cprec_recbole.compare.spec import QUALITY, Cell, Goal, Spec, Study

CONTENDERS = tuple(ORDER)
RATES = {3e-4: 0.93, 1e-3: 1.0, 3e-3: 0.97}  # tried, and what share of the best each reaches
RECOVERED = ("recovered", "recovered-int8", "uncompressed-recovered")
KINDS = {"uniform-svd": "compress", "int8": "compress"} | dict.fromkeys(RECOVERED, "recover")
WITHOUT_RATIO = ("uncompressed", "int8", "uncompressed-recovered")
GROUPS = {"head": (1.6, 511), "middle": (0.6, 290), "tail": (0.2, 142)}

Made = tuple[Goal, dict[str, Any]]


def made(
    contender: str = "uncompressed",
    ratio: float | None = None,
    seed: int = 2020,
    *,
    dataset: str = "ml-100k",
    model: str = "SASRec",
    length: int = 50,
    quality: float | None = None,
    **changes: Any,
) -> Made:
    """A run and its record: `quality` is its NDCG@20, of `search` each learning rate's; `options`
    are those of its recipe; other `changes` replace fields of the record."""
    goal = Goal(Cell(dataset, model, length), contender, ratio, seed)
    draw = np.random.default_rng([*f"{goal[:3]}".encode(), seed])
    level = 0.08 * draw.uniform(0.9, 1.05) if quality is None else quality
    epochs = 0 if KINDS.get(contender) == "compress" else int(draw.integers(14, 25))
    curve = 1.15 * level * (1 - np.exp(-np.arange(1, epochs + 1) / draw.uniform(3, 5)))
    parts = {"table": int(107_648 / (ratio or 1)), "layers": int(66_000 / (ratio or 1))}
    record = {
        "parameters": parts,
        "bytes": (1 if "int8" in contender else 4) * sum(parts.values()),
        "valid": {QUALITY: 1.15 * level},
        "test": {QUALITY: level, "hit@20": 2.4 * level, "mrr@20": 0.6 * level},
        "valid_curve": curve.tolist(),
        "best_epoch": epochs,
        "epochs": epochs,
        "epoch_seconds": draw.normal(3, 0.1, epochs).tolist(),
        "score_ms": draw.uniform(0.9, 1.2) * (ratio or 1) ** -0.15,
        "popularity": {g: {QUALITY: f * level, "cases": n} for g, (f, n) in GROUPS.items()},
        "environment": {"python": "3.11", "torch": "2.13.0", "processor": "made up"},
        "users": pack_users(np.full(8, level)),
        "search": {rate: share * 1.15 * level for rate, share in RATES.items()},
        "options": {"ranks": [64, 16], "ratio": ratio, "made_for": contender},
    }
    return goal, {**record, **changes}


def failure(error: str = "CompressionError: `ranks` are too high", **place: Any) -> Made:
    """A run that failed."""
    goal, record = made(**{"contender": "hashing", "ratio": 8.0, **place})
    return goal, {"error": error, "options": record["options"]}


def grid(
    contenders: Sequence[str] = CONTENDERS,
    ratios: Sequence[float] = (4.0, 8.0),
    seeds: Sequence[int] = (2020, 2021, 2022),
    **place: Any,
) -> list[Made]:
    """Every combination; some contenders have no ratio."""
    return [
        made(contender, ratio, seed, **place)
        for contender, seed in itertools.product(contenders, seeds)
        for ratio in ((None,) if contender in WITHOUT_RATIO else ratios)
    ]


def study_of(folder: Path, runs: Iterable[Made]) -> Findings:
    """Write a study's folder that holds these runs, and read it; contenders that a cell lacks would
    be `compressed` itself, seeds that a contender lacks are missing."""
    runs = sorted(runs, key=lambda run: (run[0].contender != "uncompressed", run[0].seed))
    goals = [goal for goal, _ in runs]
    cells = dict.fromkeys(goal.cell for goal in goals)
    ratios = tuple(dict.fromkeys(g.ratio for g in goals if g.contender not in WITHOUT_RATIO))
    data, models, lengths = (tuple(dict.fromkeys(each)) for each in zip(*cells))
    contenders, _, seeds = (tuple(dict.fromkeys(each)) for each in zip(*(g[1:] for g in goals)))
    spec = Spec(
        dict.fromkeys(data, lengths), models, dict.fromkeys(data, ratios), seeds, contenders,
        learning_rates=tuple({rate: 0 for _, r in runs for rate in r.get("search", RATES)}),
    )  # fmt: skip
    names = dict.fromkeys(str(goal.cell) for goal in spec.goals())
    plans = {n: {"rows": "rows", "asked": {}, "about": {}, "contenders": {}} for n in names}
    for goal in spec.goals():
        plans[str(goal.cell)]["contenders"][goal.name] = None
    for goal, record in runs:
        recipe = Recipe(KINDS.get(goal.contender, "train"), record.pop("options"))
        plans[str(goal.cell)]["contenders"][goal.name] = asdict(recipe)
    study, found = Study(spec, plans), {}
    for goal, record in runs:
        search, state = record.pop("search", RATES), study.state(goal, found, partly=True)
        trials = [trial for trial, _ in state.tried] + state.missing  # or what it needs first
        own = [trial for trial in trials if (trial.contender, trial.seed) == goal[1::2]]
        for trial in (trial for trial in own if trial.rate in (None, *search)):
            valid = {"valid": {QUALITY: search.get(trial.rate, 0.1)}}
            found[trial.name] = record if "error" in record else {**record, **valid}
    (folder / TRIALS).mkdir(parents=True)
    for name, record in found.items():
        (folder / TRIALS / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    told = {"spec": asdict(spec), "cells": plans}
    (folder / STUDY).write_text(json.dumps({**told, "command": "cprec"}), encoding="utf-8")
    return findings_of(folder)
