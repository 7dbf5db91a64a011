"""How good a trained model is after compress() and after recover(), and what plain methods reach.

    python examples/trained.py --models SASRec --datasets ml-100k --ratios 2 4 8
    python examples/trained.py --data-path DATA --datasets lastfm amazon-beauty --out RESULTS

Trains each model (once: its checkpoint is kept), compresses it for each ratio, recovers it in at
most a quarter of the epochs that training took until its best, and writes a line of JSON for each
result into OUT/results.jsonl as it goes. What is there already is not done again. Then the table,
OUT/trained.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from cprec_recbole import CompressionConfig, CompressionError, compress, evaluate, recover
from cprec_recbole.compression.original import Original
from cprec_recbole.costs import estimate, part_sizes, saved_bytes, shared_layers
from cprec_recbole.host.library import recbole_config
from cprec_recbole.models.recommender import CompressedRecommender

MODELS = ("NextItNet", "SASRec", "GRU4Rec")
SIZES = {"NextItNet": "embedding_size", "SASRec": "hidden_size", "GRU4Rec": "embedding_size"}
METRIC = "ndcg@20"
SETTINGS: dict[str, Any] = {
    "metrics": ["Hit", "MRR", "NDCG"],
    "topk": [5, 20],
    "metric_decimal_place": 7,
    "valid_metric": "NDCG@20",
    "epochs": 100,
    "stopping_step": 10,
    "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}


class Cell:
    """A model trained on a data set, and what is made of it."""

    def __init__(self, options: argparse.Namespace, model: str, dataset: str, seed: int) -> None:
        self.name = f"{model}-{dataset}-{seed}"
        self.key = {"model": model, "dataset": dataset, "seed": seed}
        self.folder = Path(options.out)
        self.config = self._config(options)
        self.original, self.curve = self._trained(self.config, self.name)
        self.best = 1 + max(range(len(self.curve)), key=self.curve.__getitem__)
        self.size = part_sizes(self.original).total
        self.options = options

    def _config(self, options: argparse.Namespace, **more: Any) -> Config:
        given = {**SETTINGS, **CompressionConfig.uncompressed().as_dict(), **more}
        given |= {"seed": self.key["seed"], "epochs": options.epochs}
        given["MAX_ITEM_LIST_LENGTH"] = 20 if self.key["dataset"] == "amazon-beauty" else 50
        if self.key["dataset"] != "ml-100k":
            given["data_path"] = options.data_path
        config = recbole_config(f"Cp{self.key['model']}", self.key["dataset"], given)
        logging.getLogger("recbole").setLevel(logging.ERROR)
        return config

    def _trained(self, config: Config, name: str) -> tuple[CompressedRecommender, list[float]]:
        """The model with its best epoch's weights, and the validation score after each epoch."""
        init_seed(config["seed"], True)
        self.train, self.valid, self.test = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], True)
        model = get_model(config["model"])(config, self.train._dataset)
        weights = self.folder / "checkpoints" / f"{name}.pt"
        curve = weights.with_suffix(".json")
        if not curve.exists():
            weights.parent.mkdir(parents=True, exist_ok=True)
            config["checkpoint_dir"] = str(weights.parent)
            trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
            scores: list[float] = []
            trainer.fit(
                self.train,
                self.valid,
                verbose=False,
                callback_fn=lambda epoch, score: scores.append(float(score)),
            )
            best = torch.load(trainer.saved_model_file, weights_only=False)["state_dict"]
            os.remove(trainer.saved_model_file)
            torch.save(best, weights)
            curve.write_text(json.dumps(scores))
        model.load_state_dict(torch.load(weights))
        return model.eval(), json.loads(curve.read_text())

    def budget(self) -> int:
        """Epochs of a recovery: a quarter of those until the original's best."""
        return max(1, self.best // 4)

    def results(self, done: set[str]) -> Iterator[dict[str, Any]]:
        """One result after the other; those whose names are in `done` are left out."""
        for ratio in self.options.ratios:
            for method, run in METHODS.items():
                name = f"{self.name}/{ratio:g}/{method}"
                if name in done or method not in self.options.methods:
                    continue
                row: dict[str, Any] = {"name": name, **self.key, "ratio": ratio, "method": method}
                row |= {"original_epochs": self.best, "original_parameters": self.size}
                row |= {"original": self.measure(self.original)}
                try:
                    yield row | run(self, ratio)
                except CompressionError as error:
                    yield row | {"refused": str(error)}

    def measure(self, model: CompressedRecommender) -> dict[str, float]:
        """NDCG@20 on validation and test data."""
        data = {"valid": self.valid, "test": self.test}
        return {name: evaluate(model, each)[METRIC] for name, each in data.items()}

    def recovered(self, small: CompressedRecommender) -> dict[str, Any]:
        """Quality at once, after each epoch of recovery, and at the end."""
        at_once = self.measure(small)
        found = recover(
            small, self.original, self.train, self.budget(), valid_data=self.valid, progress=False
        )
        return {
            "at_once": at_once,
            "curve": [epoch[METRIC] for epoch in found.epochs],
            "kept": found.kept,
            "recovered": self.measure(small),
        }


def ours(cell: Cell, ratio: float, **options: Any) -> dict[str, Any]:
    """compress() with a budget, then recover()."""
    small = compress(cell.original, data=cell.train, ratio=ratio, verbose=False, **options)
    told = {} if small.choice is None else {"reasons": small.choice.reasons}
    found = {**_described(small), **told}
    if small.quantized:  # a budget then counts bytes
        found["parameters"] = saved_bytes(small) / 4
    return {**found, **cell.recovered(small)}


def drawn(cell: Cell, ratio: float) -> dict[str, Any]:
    """compress() without data: the layers are fitted on histories drawn from the counts."""
    small = compress(cell.original, ratio=ratio, verbose=False)
    return {**_described(small), "at_once": cell.measure(small)}


def uniform_svd(cell: Cell, ratio: float) -> dict[str, Any]:
    """One truncated SVD for all items, layers shared and fitted as ours are."""
    sharing = compress(cell.original, ratio=ratio, verbose=False).compression.sharing
    original = Original.of(cell.original)
    for rank in range(original.dim, 0, -1):
        options = CompressionConfig(ranks=(rank,), cutoffs=(), sharing=sharing)
        planned = estimate(original.spec, original.inner, options, original.n_items, original.dim)
        if planned.sizes.total <= cell.size / ratio:
            small = compress(cell.original, options, data=cell.train)
            return {**_described(small), **cell.recovered(small)}
    raise CompressionError("no rank fits")


def pruning(cell: Cell, ratio: float) -> dict[str, Any]:
    """The smallest weights of all matrices are zero: kept ones cost 4 bytes, and each a bit that
    says whether it was kept. The recovery trains the kept ones."""
    small = compress(cell.original, CompressionConfig.uncompressed(), data=cell.train)
    matrices = [p for p in small.parameters() if p.ndim > 1]
    n_weights = sum(p.numel() for p in matrices)
    rest = cell.size - n_weights
    keep = int((4 * cell.size / ratio - n_weights / 8 - 4 * rest) / 4)
    if keep < 1:
        raise CompressionError("the bits that say what was kept are more than the budget")
    with torch.no_grad():
        sizes = torch.cat([p.abs().flatten() for p in matrices])
        least = sizes.kthvalue(n_weights - keep + 1).values
        for matrix in matrices:
            kept = matrix.abs() >= least
            matrix.mul_(kept)
            matrix.register_hook(lambda gradient, kept=kept: gradient * kept)
    return {"parameters": keep + rest + n_weights / 32, **cell.recovered(small)}


def int8(cell: Cell, ratio: float) -> dict[str, Any]:
    """Each row of each matrix in 8 bits with a scale of its own. Its ratio is what it is."""
    small = compress(cell.original, CompressionConfig.uncompressed(), data=cell.train, dtype="int8")
    found = cell.measure(small)
    return {"parameters": saved_bytes(small) / 4, "at_once": found, "recovered": found}


def narrower(cell: Cell, ratio: float) -> dict[str, Any]:
    """The same kind of model with fewer dimensions, trained from scratch, all epochs."""
    name = SIZES[cell.key["model"]]
    limit = cell.size / ratio
    for size in range(cell.original.table.dim - 2, 1, -2):
        config = cell._config(cell.options, **{name: size})
        model = get_model(config["model"])(config, cell.train._dataset)
        if part_sizes(model).total <= limit:
            trained, curve = cell._trained(config, f"{cell.name}-d{size}")
            found = {"recovered": cell.measure(trained), "epochs": len(curve), "dim": size}
            return {"parameters": part_sizes(trained).total, **found}
    raise CompressionError("no size fits")


METHODS: dict[str, Callable[[Cell, float], dict[str, Any]]] = {
    "ours": ours,
    "ours, nothing shared": lambda cell, ratio: ours(cell, ratio, sharing="none"),
    "ours, tree": lambda cell, ratio: ours(cell, ratio, softmax="tree"),
    "ours, int8": lambda cell, ratio: ours(cell, ratio, dtype="int8"),
    "ours, no data": drawn,
    "uniform SVD": uniform_svd,
    "pruning": pruning,
    "int8 rows": int8,
    "narrower": narrower,
}


def _described(small: CompressedRecommender) -> dict[str, Any]:
    options = small.compression
    start = small.warm_start
    return {
        "parameters": part_sizes(small).total,
        "ranks": options.ranks,
        "cutoffs": options.cutoffs,
        "sharing": shared_layers(small),
        "hidden_error": None if start is None else [start.copied, start.refitted, start.fitted],
    }


def table(rows: list[dict[str, Any]], command: str) -> str:
    """All results as Markdown: shares of the original's NDCG@20, at once and recovered."""
    lines = [
        "# Compressing trained models",
        "",
        f"`{command}`",
        "",
        "NDCG@20 as a share of the original's, validation / test. *Epochs*: of recovery, of the "
        "original's until its best. *Smaller*: bytes of the original over bytes left.",
        "",
        "| model | data | seed | original | budget | method | smaller | at once | recovered "
        "| epochs |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=_place):
        whole = row["original"]
        cells = [row["model"], row["dataset"], str(row["seed"])]
        cells += [f"{whole['valid']:.4f} / {whole['test']:.4f}", f"{row['ratio']:g}", row["method"]]
        if "refused" in row:
            cells += ["refused", "", "", ""]
        else:
            cells += [f"{row['original_parameters'] / row['parameters']:.2f}"]
            for when in ("at_once", "recovered"):
                found = row.get(when)
                shares = [found[k] / whole[k] for k in ("valid", "test")] if found else []
                cells += [" / ".join(f"{share:.0%}" for share in shares)]
            recovery = f"{len(row['curve'])} of {row['original_epochs']}" if "curve" in row else ""
            cells += [recovery or (f"{row['epochs']} from scratch" if "epochs" in row else "")]
        lines.append("| " + " | ".join(cells) + " |")
    ours = [r for r in rows if "refused" in r and r["method"] == "ours"]
    refused = [f"- {r['name']}: {r['refused']}" for r in sorted(ours, key=_place)]
    return "\n".join([*lines, "", *(["What was refused:", "", *refused] if refused else [])])


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a result stands in the table."""
    method = list(METHODS).index(row["method"])
    return row["dataset"], row["model"], row["seed"], row["ratio"], method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--datasets", nargs="+", default=["ml-100k"])
    parser.add_argument("--data-path", default="data", help="where they are, but ml-100k")
    parser.add_argument("--ratios", nargs="+", type=float, default=[2.0, 4.0, 8.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[2020])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=SETTINGS["epochs"])
    parser.add_argument("--out", default="trained")
    options = parser.parse_args()
    options.out = os.path.abspath(options.out)
    options.data_path = os.path.abspath(options.data_path)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "results.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {row["name"] for row in rows}
    for seed in options.seeds:
        for dataset in options.datasets:
            for model in options.models:
                for row in Cell(options, model, dataset, seed).results(done):
                    with lines.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    rows.append(row)
                    print(row["name"], row.get("at_once"), row.get("recovered"), flush=True)
    command = shlex.join(["python", "examples/trained.py", *sys.argv[1:]])
    (out / "trained.md").write_text(table(rows, command) + "\n")
    print(f"Written: {lines}, {out / 'trained.md'}")


if __name__ == "__main__":
    main()
