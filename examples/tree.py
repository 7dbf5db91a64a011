"""Where a tree softmax loses or gains against a full one: choosing blocks, or items within them.

    python examples/tree.py --models SASRec --datasets lastfm --data-path DATA --out RESULTS

Trains each model with either softmax over the same blocks, at each learning rate; the best rate on
the validation data counts. Both softmaxes say log p(item) = log p(block) + log p(item | block), so
each part is taken from one model and the other part from the other: four scores of every item, of
which two are the models themselves. Writes a line of JSON for each pair into OUT/tree.jsonl as it
goes; what is there already is not done again. Then the table, OUT/tree.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from recbole.utils import init_seed
from torch import Tensor

from cprec_recbole.compare.trial import Data, fit
from cprec_recbole.host.library import recbole_config
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.recommender import CompressedRecommender

MODELS = ("NextItNet", "SASRec", "GRU4Rec")
SOFTMAXES = ("full", "tree")
K = 20
SETTINGS: dict[str, Any] = {
    "metrics": ["NDCG"],
    "topk": [K],
    "metric_decimal_place": 6,
    "valid_metric": f"NDCG@{K}",
    "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "training": "all_positions",
}


def trained(
    options: argparse.Namespace, cell: tuple[str, str, int], softmax: str
) -> tuple[CompressedRecommender, Data, dict[str, Any]]:
    """The model of the best learning rate, its data, and what is to be said of it."""
    name, dataset, seed = cell
    best: tuple[float, CompressedRecommender, Data, dict[str, Any]] | None = None
    for rate in options.rates:
        given = {**SETTINGS, "softmax": softmax, "learning_rate": rate, "seed": seed}
        given |= {"epochs": options.epochs, "stopping_step": options.stopping_step}
        given["MAX_ITEM_LIST_LENGTH"] = options.length
        if dataset != "ml-100k":
            given["data_path"] = options.data_path
        config = recbole_config(f"Cp{name}", dataset, given)
        logging.getLogger("recbole").setLevel(logging.ERROR)
        data = Data.of(config)
        init_seed(seed, True)
        with TemporaryDirectory() as place:
            model, found = fit(config, data, Path(place))
        valid = found["valid"][f"ndcg@{K}"]
        said = {"rate": rate, "epochs": found["best_epoch"], "valid": valid}
        said |= {"test": found["test"][f"ndcg@{K}"], "ranks": model.table.ranks}
        said |= {"cutoffs": model.table.partition.cutoffs}
        if best is None or valid > best[0]:
            best = valid, model, data, said
    assert best is not None
    return best[1:]


@torch.no_grad()
def taken_apart(models: dict[str, CompressedRecommender], data: Data) -> dict[str, Any]:
    """NDCG@20 of each pair of a model for the blocks and one for the items within them, over the
    test cases, and each model's losses and NDCG@20 in parts."""
    partition = models["full"].table.partition
    block = partition.blocks(partition.position_of)  # of each item id
    n_blocks = len(partition.sizes)
    gains: dict[str, list[Tensor]] = defaultdict(list)
    where: list[Tensor] = []
    with in_eval_mode(*models.values()):
        for interaction, *_ in data.test:
            target = interaction[models["full"].ITEM_ID]
            own = block[target]
            where.append(own)
            logs = {
                name: model.softmax.log_prob(model.last_hidden(interaction))
                for name, model in models.items()
            }
            masses = {
                name: torch.stack(
                    [each[:, block == j].logsumexp(1) for j in range(n_blocks)], dim=1
                )
                for name, each in logs.items()
            }
            for name in models:
                within = logs[name] - masses[name][:, block]
                at_target = within.gather(1, target[:, None])
                gains[f"{name}: loss of the block"].append(
                    -masses[name].gather(1, own[:, None])[:, 0]
                )
                gains[f"{name}: loss within it"].append(-at_target[:, 0])
                above = (within > at_target) & (block == own[:, None])
                gains[f"{name}: within the target's block"].append(gain(above.sum(1)))
                for other in models:
                    scores = within + masses[other][:, block]
                    above = scores > scores.gather(1, target[:, None])
                    gains[f"blocks of {other}, items of {name}"].append(gain(above.sum(1)))
    own = torch.cat(where)
    means = {name: float(torch.cat(each).mean()) for name, each in gains.items()}
    parts = {
        name: [float(torch.cat(each)[own == j].mean()) for j in range(n_blocks)]
        for name, each in gains.items()
        if "loss" not in name
    }
    cases = [int((own == j).sum()) for j in range(n_blocks)]
    return {"means": means, "by_block": parts, "cases": cases}


def gain(places: Tensor) -> Tensor:
    """NDCG@20 of one relevant item at a place from 0, `[B]`."""
    return torch.where(places < K, 1 / torch.log2(2.0 + places), 0.0)


def table(rows: list[dict[str, Any]], command: str) -> str:
    """All pairs as Markdown, with means over seeds."""
    lines = ["# The tree taken apart", "", f"`{command}`", ""]
    lines += [f"NDCG@{K} on test; one line a seed, means where there are several.", ""]
    heads = ["full", "tree", "tree / full", "blocks of full, items of tree"]
    heads += ["blocks of tree, items of full", "within the block: full", "tree"]
    lines += ["| model | data | seed | " + " | ".join(heads) + " |"]
    lines += ["|---|---|--:|" + "--:|" * len(heads)]
    cells: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for row in rows:
        means = row["means"]
        full, tree = (means[f"blocks of {s}, items of {s}"] for s in SOFTMAXES)
        mixed = [means["blocks of full, items of tree"], means["blocks of tree, items of full"]]
        inside = [means[f"{s}: within the target's block"] for s in SOFTMAXES]
        numbers = [full, tree, tree / full, *mixed, *inside]
        cells[row["model"], row["dataset"]].append(numbers)
        lines.append(_line(row["model"], row["dataset"], str(row["seed"]), numbers))
    for (model, dataset), each in cells.items():
        if len(each) > 1:
            mean = [float(x) for x in np.mean(each, axis=0)]
            mean[2] = mean[1] / mean[0]
            lines.append(_line(model, dataset, "mean", mean))
    return "\n".join(lines)


def _line(model: str, dataset: str, seed: str, numbers: list[float]) -> str:
    cells = [f"{x:.1%}" if i == 2 else f"{x:.4f}" for i, x in enumerate(numbers)]
    return f"| {model} | {dataset} | {seed} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--datasets", nargs="+", default=["ml-100k"])
    parser.add_argument("--data-path", default="data", help="where they are, but ml-100k")
    parser.add_argument("--seeds", nargs="+", type=int, default=[2020])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.003, 0.001])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--stopping_step", type=int, default=5)
    parser.add_argument("--length", type=int, default=50, help="items of a history")
    parser.add_argument("--out", default="tree")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "tree.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(row["model"], row["dataset"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for dataset in options.datasets:
            for name in options.models:
                if (name, dataset, seed) in done:
                    continue
                models, said = {}, {}
                for softmax in SOFTMAXES:
                    models[softmax], data, said[softmax] = trained(
                        options, (name, dataset, seed), softmax
                    )
                row = {"model": name, "dataset": dataset, "seed": seed, **said}
                row |= taken_apart(models, data)
                with lines.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                print(table([row], "").splitlines()[-1], flush=True)
    command = shlex.join(["python", "examples/tree.py", *sys.argv[1:]])
    (out / "tree.md").write_text(table(rows, command) + "\n")
    print(f"Written: {lines}, {out / 'tree.md'}")


if __name__ == "__main__":
    main()
