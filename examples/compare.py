"""The comparison of `cprec compare` from Python: a tree softmax against the uncompressed SASRec.

python examples/compare.py [--epochs=10] [any other option of RecBole's]
"""

import sys
from pathlib import Path

from rich.console import Console

from cprec_recbole import CompressionConfig
from cprec_recbole.commands.cli import recbole_options
from cprec_recbole.compare import Spec, as_screen, findings_of, run_study

OUT = Path("compare-example")  # given again, the command goes on where it was


def main() -> None:
    options = {"epochs": 10, **recbole_options(sys.argv[1:])}
    spec = Spec.single("SASRec", "ml-100k", CompressionConfig(softmax="tree"), options=options)
    run_study(spec, OUT, command="python examples/compare.py")
    Console(width=140).print(as_screen(findings_of(OUT)))


if __name__ == "__main__":
    main()
