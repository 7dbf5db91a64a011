"""What training every position saves: seconds an epoch and quality of both objectives.

    python benchmarks/objectives.py [--epochs N] [--seeds N] [--out FOLDER]

The same compressed NextItNet on MovieLens-100K with RecBole's defaults, once with RecBole's row for
every prefix (`training: last_position`) and once with the papers' objective (`training:
all_positions`). Both make the same predictions in an epoch, in as many steps.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from cprec_recbole import CompressionConfig
from cprec_recbole.compare import Spec, as_markdown, as_screen, findings_of, run_study
from cprec_recbole.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    command = f"python benchmarks/objectives.py --epochs {arguments.epochs} "
    command += f"--seeds {arguments.seeds}"
    options = {"epochs": arguments.epochs, "stopping_step": 10}
    texts = []
    for training in ("last_position", "all_positions"):
        config = CompressionConfig(training=training)
        spec = Spec.single("NextItNet", "ml-100k", config, seeds=arguments.seeds, options=options)
        with TemporaryDirectory() as folder:
            run_study(spec, Path(folder), command=command, only=["*_compressed_*"])
            findings = findings_of(Path(folder))
        Console(width=140).print(training, as_screen(findings))
        texts.append(f"`training: {training}`\n\n{as_markdown(findings)}")
    write_text(arguments.out / "objectives.md", "\n".join(texts))


if __name__ == "__main__":
    main()
