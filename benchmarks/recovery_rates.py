"""Which learning rate `recover` should have, where the original was trained at RecBole's own.

    python benchmarks/recovery_rates.py [--original-rate .001] [--rates .003 .01] [--ratios 4 8]
        [--models NAME ...] [--datasets NAME ...] [--data-path DATA] [--out FOLDER]

Each original is trained until its validation NDCG@20 has not risen for five epochs. Then it is
compressed in int8 to each ratio of its bytes and recovered for four epochs at each rate, from the
same start, with the best epoch kept. One seed, 2020.
"""

from __future__ import annotations

import argparse
import copy
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cprec_recbole import CompressedRecommender, CompressionConfig, compress, recover
from cprec_recbole.compare.spec import SETTINGS
from cprec_recbole.compare.trial import Data, fit
from cprec_recbole.environment import environment
from cprec_recbole.files import write_text
from cprec_recbole.host.library import recbole_config
from cprec_recbole.training.evaluation import evaluate

LENGTHS = {"amazon-beauty": 20}  # items of a history that are read; 50 elsewhere
EPOCHS, PATIENCE, MEASURED = 60, 5, "ndcg@20"


def original_of(model: str, dataset: str, rate: float, data_path: str | None) -> tuple[Any, Data]:
    """A trained, uncompressed model, and its data."""
    options: dict[str, Any] = {
        "epochs": EPOCHS,
        "stopping_step": PATIENCE,
        "learning_rate": rate,
        **CompressionConfig.uncompressed().as_dict(),
        "MAX_ITEM_LIST_LENGTH": LENGTHS.get(dataset, 50),
        "metric_decimal_place": 6,
        "use_gpu": False,
    }
    options |= {} if data_path is None else {"data_path": data_path}
    config = recbole_config(f"Cp{model}", dataset, options, [str(SETTINGS)])
    data = Data.of(config)
    with TemporaryDirectory() as place:
        trained, found = fit(config, data, Path(place), lambda *epoch: print(".", end=""))
    print(f" {model} on {dataset}: epoch {found['best_epoch']}", flush=True)
    return trained.eval(), data


def quality(model: CompressedRecommender, data: Data) -> tuple[float, float]:
    """NDCG@20 on validation and test."""
    valid, test = (evaluate(model, part)[MEASURED] for part in (data.valid, data.test))
    return valid, test


def rows(model: str, dataset: str, arguments: argparse.Namespace) -> list[str]:
    """A row for each ratio: the original, the start, and what each rate came to."""
    original, data = original_of(model, dataset, arguments.original_rate, arguments.data_path)
    whole = quality(original, data)
    found = []
    for ratio in arguments.ratios:
        start = compress(original, ratio=ratio, dtype="int8", data=data.train, verbose=False)
        cells = [f"{model}, {dataset}", f"÷ {ratio:g}", *map(shown, (whole, quality(start, data)))]
        for rate in arguments.rates:
            small = copy.deepcopy(start)
            recover(
                *(small, original, data.train),
                valid_data=data.valid,
                learning_rate=rate,
                seed=2020,
                progress=False,
            )
            cells.append(shown(quality(small, data)))
        found.append(f"| {' | '.join(cells)} |")
        print(found[-1], flush=True)
    return found


def shown(values: tuple[float, float]) -> str:
    """Validation and test."""
    return " / ".join(f"{value:.4f}".lstrip("0") for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original-rate", type=float, default=0.001)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01])
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--models", nargs="+", default=["NextItNet", "GRU4Rec", "SASRec"])
    parser.add_argument("--datasets", nargs="+", default=["ml-100k"])
    parser.add_argument("--data-path", help="where data sets are; RecBole's own place without it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    given = vars(arguments) | {"data_path": arguments.data_path and "DATA"}
    command = []
    for name, value in given.items():
        if name != "out" and value is not None and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    rates = [f"{rate:g}".lstrip("0") for rate in arguments.rates]
    table = [
        f"| | bytes | original | compressed | {' | '.join(f'at {rate}' for rate in rates)} |",
        f"|---|--:|--:|--:|{'--:|' * len(rates)}",
    ]
    title = f"# The learning rate of `recover`: originals trained at {arguments.original_rate:g}"
    about = ", ".join(f"{name} {value}" for name, value in environment().items() if value)
    what = (
        "NDCG@20, validation / test, of the original, of the same compressed in int8, and of that "
        "recovered for four epochs at each rate; one seed, 2020."
    )
    text = [title, "", f"`{shlex.join(['python', 'benchmarks/recovery_rates.py', *command])}`"]
    text += ["", about, "", what, "", *table]
    for dataset in arguments.datasets:
        for model in arguments.models:
            text += rows(model, dataset, arguments)
            write_text(arguments.out / "recovery-rates.md", "\n".join([*text, ""]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
