"""Made-up studies: run records in the shape that a study keeps, seeded, of no meaning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cprec_recbole.compare.page.styles import KNOWN

CONTENDERS = tuple(KNOWN)
# what share of the quality is left at ratio 4, and what share of the rare items'
KEPT = {
    "compressed": (1.0, 0.9), "recovered": (1.02, 0.95), "tree": (0.95, 0.8),
    "untied": (0.93, 0.85),
    "blocks-only": (0.99, 0.9), "sharing-only": (1.01, 1.0), "narrower": (0.96, 0.9),
    "one-rank": (0.92, 0.8), "uniform-svd": (0.85, 0.6), "int8": (0.998, 1.0),
    "hashing": (0.5, 0.3),
    "recjpq-svd": (0.97, 0.7), "recjpq-random": (0.9, 0.6),
}  # fmt: skip
AFTER_TRAINING = ("uniform-svd", "int8")
ITEMS = {"ml-100k": 1682, "lastfm": 17632, "amazon-beauty": 12101}
LAYERS = {"NextItNet": 253_760, "SASRec": 66_000, "GRU4Rec": 83_000}
LEVEL = {"ml-100k": 0.079, "lastfm": 0.052, "amazon-beauty": 0.039}


def record(
    dataset: str = "ml-100k",
    model: str = "SASRec",
    contender: str = "uncompressed",
    ratio: float | None = None,
    seed: int = 2020,
    **changes: Any,
) -> dict[str, Any]:
    """One finished run; `changes` replace fields of it."""
    rng = np.random.default_rng([seed, *f"{dataset}{model}{contender}{ratio}".encode()])
    share, rare = KEPT.get(contender, (1.0, 1.0))
    size = ratio or 1.0
    share, rare = share ** (size / 4 + 0.5), rare ** (size / 4 + 0.5)
    level = LEVEL.get(dataset, 0.05) * share * rng.normal(1, 0.02)
    table, layers = ITEMS.get(dataset, 5000) * 64, LAYERS.get(model, 70_000)
    parts = {
        "table": int(table / size * (rng.uniform(0.95, 1.0) if ratio else 1)),
        "layers": int(layers / size),
        "softmax": 128 if contender == "tree" else table // 16 if contender == "untied" else 0,
    }
    kept = 4.0 if contender in ("int8",) else 1.0
    if kept > 1:
        parts = {"table": table, "layers": layers, "softmax": 0}
    epochs = int(rng.integers(14, 25))
    rise = 1 - np.exp(-np.arange(1, epochs + 1) / rng.uniform(3, 5))
    curve = 1.15 * level * rise * rng.normal(1, 0.012, epochs)
    best = int(curve.argmax())
    name = "-".join(str(v) for v in (dataset, model, 50, contender, ratio, seed))
    made = {
        "key": name,
        "dataset": dataset,
        "model": model,
        "length": 50,
        "seed": seed,
        "contender": contender,
        "ratio": ratio,
        "options": {} if ratio is None else {"ranks": [64, 16, 4], "sharing": "cross_block"},
        "learning_rate": 1e-3,
        "search": [
            {"learning_rate": rate, "valid": float(curve[best] * f)}
            for rate, f in ((3e-4, 0.93), (1e-3, 1.0), (3e-3, 0.97))
        ],
        "parameters": parts,
        "total_parameters": sum(parts.values()),
        "bytes": int(4 * sum(parts.values()) / kept) + 20_000,
        "valid": {"ndcg@20": float(curve[best])},
        "test": {"ndcg@20": level, "hit@20": 2.4 * level, "mrr@20": 0.6 * level},
        "valid_curve": [] if contender in AFTER_TRAINING else [float(v) for v in curve],
        "best_epoch": best + 1,
        "epochs": epochs,
        "epoch_seconds": [float(v) for v in rng.normal(3, 0.1, epochs)],
        "score_ms": float(rng.uniform(0.9, 1.2) * (2 + table / 4e5) * size**-0.15),
        "popularity": {
            group: {"ndcg@20": level * f, "hit@20": 2.4 * level * f, "cases": cases}
            for group, f, cases in (
                ("head", 1.6, 511),
                ("middle", 0.6, 290),
                ("tail", 0.25 * rare, 142),
            )
        },
        "command": f"cprec compare --model {model} --dataset {dataset} --learning_rate=0.001",
        "environment": {"python": "3.11", "torch": "2.13.0", "processor": "made up", "cores": 2},
    }
    return {**made, **changes}


def failure(**changes: Any) -> dict[str, Any]:
    """One run that failed."""
    about = (
        "key",
        "dataset",
        "model",
        "length",
        "seed",
        "contender",
        "ratio",
        "options",
        "command",
    )
    made = record(contender="hashing", ratio=8.0, seed=2021)
    error = "CompressionError: Expected `ranks` to be at most 64, but got [128]; lower them."
    return {**{name: made[name] for name in about}, "error": error, **changes}


def grid(
    datasets: Sequence[str] = tuple(ITEMS),
    models: Sequence[str] = tuple(LAYERS),
    contenders: Sequence[str] = CONTENDERS,
    ratios: Sequence[float] = (4.0, 8.0),
    seeds: Iterable[int] = (2020, 2021, 2022),
) -> list[dict[str, Any]]:
    """Every combination; the uncompressed model and int8 have one ratio only."""
    fixed: dict[str, Sequence[float | None]] = {"uncompressed": (None,), "int8": (None,)}
    return [
        record(dataset, model, contender, ratio, seed)
        for dataset in datasets
        for model in models
        for contender in contenders
        for ratio in fixed.get(contender, ratios)
        for seed in seeds
    ]


def write_study(folder: Path, records: Iterable[dict[str, Any]]) -> Path:
    """A study's folder that holds these runs."""
    (folder / "runs").mkdir(parents=True)
    for i, made in enumerate(records):
        (folder / "runs" / f"{i:04d}.json").write_text(json.dumps(made), encoding="utf-8")
    return folder
