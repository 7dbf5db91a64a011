"""Train SASRec on MovieLens-100K, make it small, and keep both models where the service finds them.

    python -m examples.serve.prepare --out serving --epochs 20

Writes OUT/uncompressed, OUT/compressed (a budget, a recovery, rows in int8) and OUT/titles.json.
Any RecBole option can be added as --name=value.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import recbole
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from cprec_recbole import CompressionConfig, compress, evaluate, quantize, recover
from cprec_recbole.commands.cli import recbole_options
from cprec_recbole.costs import part_sizes, saved_bytes
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.host.library import recbole_config, working_directory
from cprec_recbole.models import CompressedRecommender

FILMS = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.item"
METRIC = "ndcg@20"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("serving"))
    parser.add_argument("--epochs", type=int, default=20, help="of the original")
    parser.add_argument("--recover", type=int, default=5, help="epochs of the recovery")
    parser.add_argument("--ratio", type=float, default=2.0, help="budget, before int8")
    options, rest = parser.parse_known_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = {**recbole_options(rest), "epochs": options.epochs}
    original, (train, valid, test) = trained(given)
    small = compress(original, ratio=options.ratio, data=train)
    recover(small, original, train, options.recover, valid_data=valid)
    small = quantize(small)
    for name, model in (("uncompressed", original), ("compressed", small)):
        model.save_pretrained(out / name, train._dataset)
        print(
            f"{name}: {part_sizes(model).total:,} parameters, {saved_bytes(model):,} bytes, "
            f"{METRIC} on test {evaluate(model, test)[METRIC]:.4f}"
        )
    if FILMS.exists():
        films = titles(train._dataset)
        (out / "titles.json").write_text(json.dumps(films, ensure_ascii=False), encoding="utf-8")
    folders = f"{options.out / 'uncompressed'} {options.out / 'compressed'}"
    print(f"python -m examples.serve {folders}")


def trained(given: dict[str, Any]) -> tuple[CompressedRecommender, Any]:
    """The uncompressed model, with the weights of its best epoch, and its data."""
    settings = {
        "metrics": ["NDCG"],
        "topk": 20,
        "valid_metric": "NDCG@20",
        "show_progress": False,
        "state": "ERROR",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        **CompressionConfig.uncompressed().as_dict(),
        **given,
    }
    with TemporaryDirectory() as scratch, working_directory(scratch):  # for RecBole's logs
        config = recbole_config("CpSASRec", "ml-100k", settings)
        init_seed(config["seed"], True)
        data = data_preparation(config, create_dataset(config))
        model = get_model(config["model"])(config, data[0]._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        trainer.fit(*data[:2], verbose=False)
        trainer.evaluate(data[1], load_best_model=True)  # leaves the best epoch's weights
    return model.eval(), data


def titles(dataset: Any) -> list[dict[str, str]]:
    """Token, title, year and genres of the films, those that most people saw first."""
    ids = dataset.field2token_id["item_id"]
    films = pd.read_csv(FILMS, sep="\t", dtype=str, keep_default_na=False)
    films.columns = ["token", "title", "year", "genres"]
    films["title"] = films["title"].map(as_spoken)
    counts = item_counts(dataset)
    films["seen"] = [counts[ids[token]] if token in ids else 0 for token in films["token"]]
    films = films.sort_values("seen", ascending=False, kind="stable")
    return films.drop(columns="seen").to_dict("records")


def as_spoken(title: str) -> str:
    """`Shawshank Redemption, The` as people say it."""
    name, comma, article = title.rpartition(", ")
    return f"{article} {name}" if comma and article in ARTICLES else title


ARTICLES = {"The", "A", "An", "La", "Le", "Les", "Il", "Das", "Der", "El"}

if __name__ == "__main__":
    main(sys.argv[1:])
