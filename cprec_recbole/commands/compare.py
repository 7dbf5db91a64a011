"""`cprec compare`: an uncompressed and a compressed model, trained side by side."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cprec_recbole.commands.common import (
    MODELS,
    add_compression,
    console,
    given_options,
)
from cprec_recbole.compare import Experiment, as_markdown, as_table, contenders, save
from cprec_recbole.compare.controls import ALL, CONTROLS, find_controls
from cprec_recbole.compare.results import as_json
from cprec_recbole.config import CompressionConfig
from cprec_recbole.files import make_folder


def add_parser(commands: Any) -> None:
    """Add the command to `cprec`."""
    compare = commands.add_parser(
        "compare",
        help="train an uncompressed and a compressed model side by side",
        description="Train an uncompressed and a compressed model side by side and report quality, "
        "size and speed. Any further --name=value is passed on to RecBole.",
        allow_abbrev=False,
    )
    compare.set_defaults(run=run)
    compare.add_argument("--model", required=True, choices=MODELS)
    compare.add_argument(
        "--dataset", default="ml-100k", help="RecBole's name (default: %(default)s)"
    )
    compare.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds")
    compare.add_argument("--with-stock", action="store_true", help="also RecBole's own model")
    compare.add_argument(
        "--length", type=int, choices=(10, 20, 50, 100), help="items of a history (RecBole: 50)"
    )
    compare.add_argument(
        "--out", default="cprec-compare", metavar="FOLDER", help="for compare.json and compare.md"
    )
    compare.add_argument(
        "--controls",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"also controls: {ALL}, or out of {', '.join(CONTROLS)}",
    )
    add_compression(compare)


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Train, measure, print the table and write it."""
    if options.length is not None:
        passed_on = {"MAX_ITEM_LIST_LENGTH": options.length, **passed_on}
    columns = contenders(
        options.model,
        CompressionConfig(**given_options(options)),
        with_stock=options.with_stock,
        controls=find_controls(options.controls),
    )
    screen = console()
    logging.getLogger("recbole").setLevel(logging.ERROR)
    experiment = Experiment(columns, options.dataset, options.seeds, passed_on, options.config)
    out = Path(options.out)
    make_folder(out)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, valid {task.fields[score]}"),
        TimeElapsedColumn(),
        console=screen,
    ) as progress:
        tasks: dict[tuple[str, int], TaskID] = {}

        def on_run(contender: str, seed: int) -> None:
            _finish(progress, tasks)
            label = f"{contender}, seed {seed}"
            tasks[contender, seed] = progress.add_task(label, total=experiment.epochs, score="-")

        def on_epoch(contender: str, seed: int, epoch: int, score: float) -> None:
            shown = f"{score:.4f}"
            progress.update(tasks[contender, seed], completed=epoch + 1, score=shown)
            if not screen.is_terminal:  # a log shows no bars: a line an epoch
                screen.print(f"{contender}, seed {seed}, epoch {epoch + 1}: valid {shown}")

        comparison = experiment.run(command, on_epoch, on_run)
        _finish(progress, tasks)
    save(as_json(comparison), out / "compare.json")
    save(as_markdown(comparison), out / "compare.md")
    screen.print(as_table(comparison))
    screen.print(f"Written: {out / 'compare.json'}, {out / 'compare.md'}")
    return 0


def _finish(progress: Progress, tasks: dict[tuple[str, int], TaskID]) -> None:
    """Early stopping ends a run before its last epoch; its bar is full all the same."""
    for task in tasks.values():
        progress.update(task, total=progress.tasks[task].completed)
        progress.stop_task(task)
