"""`cprec compress`: a RecBole checkpoint made small, recovered and kept in a folder."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from cprec_recbole.commands.common import add_compression, console, given_options, value
from cprec_recbole.compression.compress import compress
from cprec_recbole.compression.recover import recover
from cprec_recbole.config import CompressionError, check_whole
from cprec_recbole.costs import part_sizes, saved_bytes
from cprec_recbole.models.saving import folder_bytes
from cprec_recbole.training.checkpoint import load_trained
from cprec_recbole.training.evaluation import evaluate

# RecBole's options that recover() takes, by its names for them
_RECOVER = {"learning_rate": "learning_rate", "train_batch_size": "batch_size", "seed": "seed"}


def add_parser(commands: Any) -> None:
    """Add the command to `cprec`."""
    parser = commands.add_parser(
        "compress",
        help="make a trained model small and keep it in a folder",
        description="Compress a model that RecBole has trained, measure it before and after, and "
        "write it to a folder that load_pretrained and `cprec recommend` read. Any further "
        "--name=value is passed on to RecBole, e.g. --data_path=DATA.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="RecBole's .pth")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--ratio", type=value, metavar="8", help="so many times fewer parameters")
    budget.add_argument("--size", metavar="2MB", help="at most so many bytes of weights")
    budget.add_argument(
        "--max-loss", type=value, metavar="0.01", help="the smallest that loses at most this share"
    )
    parser.add_argument(
        "--recover", type=int, default=0, metavar="EPOCHS", help="fine-tune for some epochs"
    )
    parser.add_argument(
        "--dtype",
        metavar="{int8,mixed,int4}",
        help="quantize; a budget then counts bytes",
    )
    add_compression(parser, training=False)


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Compress, measure, recover where asked, write, print the table."""
    logging.getLogger("recbole").setLevel(logging.ERROR)
    check_whole("recover", options.recover, 0)
    _check_out(Path(options.out))
    for name in passed_on:
        if name in ("learning_rate", "train_batch_size") and not options.recover:
            raise CompressionError(f"Expected `{name}` with --recover, which alone reads it.")
        if name in ("epochs", "stopping_step", "learner", "weight_decay"):
            raise CompressionError(
                f"Expected no `{name}`, as nothing here trains by it; --recover EPOCHS fine-tunes."
            )
    screen = console()
    found = load_trained(options.checkpoint, passed_on)
    small = compress(
        found.model,
        data=found.train,
        ratio=options.ratio,
        size=options.size,
        max_loss=options.max_loss,
        valid_data=found.valid if options.max_loss is not None else None,
        dtype=options.dtype,
        **given_options(options),
    )
    data = {part: each for part, each in zip(("valid", "test"), found[2:]) if len(each)}
    made = "compressed" if options.dtype is None else f"compressed, {options.dtype}"
    rows = [("original", found.model, _quality(found.model, data))]
    rows.append((made, small, _quality(small, data)))
    if options.recover:
        given = {own: passed_on[name] for name, own in _RECOVER.items() if name in passed_on}
        valid = data.get("valid")
        recover(small, found.model, found.train, options.recover, valid_data=valid, **given)
        rows.append(("recovered", small, _quality(small, data)))
    small.save_pretrained(options.out)
    screen.print(_table(rows))
    screen.print(f"Written: {options.out} ({folder_bytes(Path(options.out)):,} bytes)")
    return 0


def _check_out(out: Path) -> None:
    """Raise a CompressionError where nothing can be written, before anything is computed."""
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise CompressionError(
            f"Expected `out` to be a folder that can be written, but got {out}: {there} cannot."
        )


def _quality(model: Any, data: dict[str, Any]) -> dict[str, float]:
    """Every metric on validation and test data, or on that of the two which there is."""
    scores = {part: evaluate(model, loader) for part, loader in data.items()}
    return {f"{part} {name}": each[name] for part, each in scores.items() for name in each}


def _table(rows: list[tuple[str, Any, dict[str, float]]]) -> Table:
    """One column a model: sizes by part, then quality."""
    names, models, scores = zip(*rows)
    table = Table("", *(Column(name, justify="right") for name in names))
    sizes = [part_sizes(model) for model in models]
    parts = {"parameters": "total", "  item table": "table", "  layers": "layers"}
    for name, part in {**parts, "  softmax": "softmax"}.items():
        table.add_row(name, *(f"{getattr(size, part):,}" for size in sizes))
    n_bytes = [saved_bytes(model) for model in models]
    table.add_row("MB", *(f"{size / 1e6:,.3f}" for size in n_bytes))
    table.add_row("smaller", *(f"{n_bytes[0] / size:.2f}x" for size in n_bytes))
    table.add_section()
    for metric, whole in scores[0].items():
        shares = [f" ({each[metric] / whole:.1%})" if whole else "" for each in scores]
        cells = [f"{each[metric]:.4f}{share}" for each, share in zip(scores, ["", *shares[1:]])]
        table.add_row(metric, *cells)
    return table
