"""What training every position saves: seconds an epoch and quality of both objectives, one run.

    python benchmarks/objectives.py [--epochs N] [--seeds N] [--out FOLDER]

The same compressed NextItNet on MovieLens-100K with RecBole's defaults, once with RecBole's row for
every prefix (`training: last_position`) and once with the papers' objective (`training:
all_positions`). Both make the same predictions in an epoch, in as many steps.
"""

import argparse
from pathlib import Path

from rich.console import Console

from cprec_recbole.compare import Contender, Experiment, as_markdown, as_table, save
from cprec_recbole.compare.results import as_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()

    columns = [
        Contender(training, "CpNextItNet", {"training": training})
        for training in ("last_position", "all_positions")
    ]
    options = {"epochs": arguments.epochs, "stopping_step": 10}
    comparison = Experiment(columns, "ml-100k", arguments.seeds, options).run(
        command=f"python benchmarks/objectives.py --epochs {arguments.epochs} "
        f"--seeds {arguments.seeds}",
        on_epoch=lambda name, seed, epoch, score: print(f"{name} {epoch} {score:.4f}", flush=True),
    )
    save(as_json(comparison), arguments.out / "objectives.json")
    save(as_markdown(comparison), arguments.out / "objectives.md")
    Console(width=140).print(as_table(comparison))


if __name__ == "__main__":
    main()
