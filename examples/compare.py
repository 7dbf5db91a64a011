"""The comparison of `cprec compare` from Python: a tree softmax against the uncompressed SASRec.

python examples/compare.py [EPOCHS]
"""

import sys

from rich.console import Console

from cprec_recbole import CompressionConfig
from cprec_recbole.compare import Experiment, as_table, contenders


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    columns = contenders("SASRec", CompressionConfig(softmax="tree"))
    experiment = Experiment(columns, "ml-100k", seeds=1, options={"epochs": epochs})
    comparison = experiment.run(
        command="python examples/compare.py",
        on_epoch=lambda name, seed, epoch, score: print(f"{name}, epoch {epoch}: {score:.4f}"),
    )
    Console(width=140).print(as_table(comparison))


if __name__ == "__main__":
    main()
