"""`cprec report`: sizes of every choice, before any training."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from cprec_recbole.catalogue import size_rows
from cprec_recbole.commands.common import (
    MODELS,
    add_compression,
    compression_for,
    console,
    dataset_of,
)

REPORT_CAPTION = (
    "Parameters by part; sharing: sets of parameters kept/layers; softmax +: what the softmax has "
    "beside the table; MFLOP: to score the catalogue for one user, once its hidden state is known."
)


def add_parser(commands: Any) -> None:
    """Add the command to `cprec`."""
    report = commands.add_parser(
        "report",
        help="sizes alone, before any training",
        description="What each choice of ranks, cutoffs and sharing would cost, untrained.",
        allow_abbrev=False,
    )
    report.set_defaults(run=run)
    report.add_argument("model", choices=MODELS)
    catalogue = report.add_mutually_exclusive_group()
    catalogue.add_argument("--dataset", help="RecBole's name, or in --config (default: ml-100k)")
    catalogue.add_argument("--items", type=int, metavar="N", help="a catalogue of N items")
    add_compression(report)


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Print the table."""
    title, rows = size_rows(
        options.model,
        compression_for(options.model, options),
        dataset_of(options) if options.items is None else None,
        options.items,
        passed_on,
        options.config,
    )
    table = Table(title=title, title_justify="left", caption=REPORT_CAPTION, caption_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    console().print(table)
    return 0
