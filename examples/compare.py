"""The comparison of `cprec compare` from Python: a tree softmax against the uncompressed SASRec.

python examples/compare.py [--epochs=10] [any other option of RecBole's]
"""

import sys

from rich.console import Console

from cprec_recbole import CompressionConfig
from cprec_recbole.commands.cli import recbole_options
from cprec_recbole.compare import Experiment, as_table, contenders


def main() -> None:
    options = {"epochs": 10, **recbole_options(sys.argv[1:])}
    columns = contenders("SASRec", CompressionConfig(softmax="tree"))
    experiment = Experiment(columns, "ml-100k", seeds=1, options=options)
    comparison = experiment.run(
        command="python examples/compare.py",
        on_epoch=lambda name, seed, epoch, score: print(f"{name}, epoch {epoch}: {score:.4f}"),
    )
    Console(width=140).print(as_table(comparison))


if __name__ == "__main__":
    main()
