"""What share of the tail the index reads for one user, on models trained on real data.

    python benchmarks/skipping.py --dataset NAME --data_path FOLDER [--epochs N] [--out FOLDER]

Small catalogues are sorted whole, because that is quicker; here they are searched all the same, and
every tail block is indexed, to see what bounds do on trained weights.
"""

import argparse
from pathlib import Path
from unittest import mock

import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from cprec_recbole.compare.results import environment, save
from cprec_recbole.host.library import recbole_config
from cprec_recbole.search import table

N_USERS, K = 500, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", type=Path)
    parser.add_argument("--model", default="CpSASRec")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    lines = [
        f"# Share of the tail that is read: {arguments.model} on {arguments.dataset}",
        "",
        f"`python benchmarks/skipping.py --dataset {arguments.dataset} --model {arguments.model} "
        f"--epochs {arguments.epochs}`",
        "",
        ", ".join(f"{name} {value}" for name, value in environment().items() if value),
        "",
        f"The {K} best of all items for each of {N_USERS} test users alone, after "
        f"{arguments.epochs} epochs, seed 2020; default cutoffs and ranks. Identical to the result "
        "without an index.",
        "",
        "| softmax | items outside the head | NDCG@20 | tail read, mean | median | users with a "
        "tail item among their 20 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for softmax in ("full", "tree"):
        lines.append(measure(arguments, softmax))
        print(lines[-1], flush=True)
    name = f"skipping-{arguments.dataset}.md"
    save("\n".join(lines) + "\n", arguments.out / name)


def measure(arguments: argparse.Namespace, softmax: str) -> str:
    """Train, and one row of the table."""
    options = {
        "softmax": softmax,
        "epochs": arguments.epochs,
        "MAX_ITEM_LIST_LENGTH": 20,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "metrics": ["NDCG"],
        "topk": [20],
        "valid_metric": "NDCG@20",
        "show_progress": False,
        "seed": 2020,
    }
    if arguments.data_path:
        options["data_path"] = str(arguments.data_path)
    config = recbole_config(arguments.model, arguments.dataset, options)
    init_seed(2020, True)
    train, valid, test = data_preparation(config, create_dataset(config))
    model = get_model(arguments.model)(config, train._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], arguments.model)(config, model)
    trainer.fit(train, valid, saved=False, verbose=False)
    ndcg = trainer.evaluate(test, load_best_model=False)["ndcg@20"]
    model.eval()
    users = next(iter(test))[0][slice(0, N_USERS)]
    with torch.no_grad():
        hidden = model.last_hidden(users)
    exact = model.head.topk(hidden, K)
    with (
        mock.patch.object(exact, "_FEW_SCORES", 0),
        mock.patch.multiple(table, FEW_ITEMS=0, _MIN_ROWS=1),
    ):
        model.build_index()
        found = [model.head.search(row.unsqueeze(0), K) for row in hidden]
    assert torch.equal(torch.cat([one.topk.items for one in found]), exact.items)
    shares = torch.tensor([one.tail_share for one in found])
    partition = model.table.partition
    positions = partition.positions(exact.items)
    with_tail = float((positions >= partition.cutoffs[0]).any(1).float().mean())
    n_tail = partition.n_items - partition.cutoffs[0]
    return (
        f"| {softmax} | {n_tail:,} | {ndcg:.4f} | {float(shares.mean()):.1%} | "
        f"{float(shares.median()):.1%} | {with_tail:.0%} |"
    )


if __name__ == "__main__":
    main()
