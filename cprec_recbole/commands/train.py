"""`cprec train`: train and test a model, on one process or several; or go on where it stopped."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from cprec_recbole.commands import common
from cprec_recbole.parallel.group import place_of_torchrun
from cprec_recbole.training.run import Job, train


def add_parser(commands: Any) -> None:
    """Add the command to `cprec`."""
    parser = commands.add_parser(
        "train",
        help="train and test a model, on one process or several",
        description="Train and test a model, one of ours or one of RecBole's own, on one process "
        "or several (--nproc, or under torchrun). Any further --name=value is passed on to "
        "RecBole, as --data_path=DATA or --learning_rate=0.003; our loss_memory is such an "
        "option too (docs/scale.md).",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="{CpSASRec,...,SASRec,...}", help="or in --config")
    parser.add_argument("--dataset", help="RecBole's name, or in --config (default: ml-100k)")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes to start on this machine (default: 1)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="for best.pth, last.pth and result.json")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, where it stopped"
    )
    common.add_compression(parser)


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Train, and print a line an epoch and the table of metrics."""
    model, dataset = common.model_of(options), common.dataset_of(options)
    given = {"show_progress": False} | common.from_files(options)
    given |= common.given_options(options) | passed_on
    named = tuple(passed_on)
    job = Job(
        model, dataset, given, out=options.out, resume=options.resume, say=_print_line, named=named
    )
    result = train(job, options.nproc)
    place = place_of_torchrun()
    if place is not None and place.rank > 0:  # torchrun starts this command several times
        return 0
    table = Table(title=f"{model} on {dataset}")
    for name in ("metric", "valid", "test"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    valid, test = result["best_valid_result"] or {}, result["test_result"] or {}
    for metric in test or valid:
        numbers = [found.get(metric) for found in (valid, test)]
        table.add_row(metric, *("" if n is None else f"{n:.4f}" for n in numbers))
    common.console().print(table)
    if options.out is not None:
        _print_line(f"Written: {options.out}")
    return 0


def _print_line(text: str) -> None:
    """A line that is seen at once, also through a pipe."""
    common.console().print(text, highlight=False, soft_wrap=True)
