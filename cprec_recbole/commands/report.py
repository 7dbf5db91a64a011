"""`cprec report`: what each choice of ranks, cutoffs and sharing would cost, untrained."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from recbole.config import Config
from rich.table import Table

from cprec_recbole.commands import common
from cprec_recbole.config import SHARING_SCHEMES, CompressionConfig, check_whole, reject_unknown
from cprec_recbole.costs import Estimate, describe_sharing, estimate
from cprec_recbole.host import library

_SHOWN_ENDS = 3  # of blocks, in a cell of the table
_CAPTION = (
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
    report.add_argument("model", choices=common.MODELS)
    catalogue = report.add_mutually_exclusive_group()
    catalogue.add_argument("--dataset", help="RecBole's name, or in --config (default: ml-100k)")
    catalogue.add_argument("--items", type=int, metavar="N", help="a catalogue of N items")
    common.add_compression(report)


def run(options: argparse.Namespace, passed_on: dict[str, Any], command: str) -> int:
    """Print the table."""
    compression = common.compression_for(options.model, options)
    dataset = common.dataset_of(options) if options.items is None else "ml-100k"
    config = library.recbole_config(f"Cp{options.model}", dataset, passed_on, options.config)
    reject_unknown(passed_on, library.known_options(config))
    title, rows = size_rows(config, compression, options.items)
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "softmax" else "right")
    for row in rows:
        table.add_row(*row.values())
    common.console().print(table)
    return 0


def size_rows(
    config: Config, compression: CompressionConfig, items: int | None = None
) -> tuple[str, list[dict[str, str]]]:
    """A title, and named cells in rows: sizes of a model, uncompressed, under the given choice and
    with one option of it varied; the catalogue is the data set's, or has so many `items`."""
    spec = config.model_class.spec
    if items is None:
        n_items = int(library.recbole_dataset(config).item_num)
        title = f"{spec.name} on {config['dataset']} ({n_items - 1:,} items)"
    else:
        n_items = check_whole("items", items) + 1  # and the padding item
        title = f"{spec.name} for {items:,} items"
    dim = spec.dim(check_whole(spec.size_option, config[spec.size_option]))
    # as much of a data set as a model's constructor asks for
    catalogue = SimpleNamespace(iid_field=config["ITEM_ID_FIELD"], num=lambda field: n_items)
    with library.fitting_options(spec.name):
        inner = spec.build_inner(config, catalogue)
    uncompressed = estimate(spec, inner, CompressionConfig.uncompressed(), n_items, dim)
    rows = [_row("uncompressed", uncompressed, uncompressed, "")]
    ends = compression.plan(dim, n_items).cutoffs
    if len(ends) > _SHOWN_ENDS:
        title += f"; its {len(ends)} blocks end at {', '.join(f'{end:,}' for end in ends)}"
    for choice in _choices(compression, dim, n_items):
        found = estimate(spec, inner, choice, n_items, dim)
        layers, sets = spec.sharing(inner, choice.sharing)
        sharing = describe_sharing(choice.sharing, len(layers), len(sets))
        kind = choice.softmax if choice.tied else f"{choice.softmax}, untied"
        rows.append(_row(kind, found, uncompressed, sharing))
    return title, rows


def _choices(base: CompressionConfig, dim: int, n_items: int) -> list[CompressionConfig]:
    """The given choice, then what varies one option of it."""
    sharing = [{"sharing": scheme} for scheme in SHARING_SCHEMES if scheme != base.sharing]
    softmax = "tree" if base.softmax == "full" else "full"
    variations: list[dict[str, Any]] = [{}, *sharing, {"softmax": softmax}, {"tied": not base.tied}]
    plan = base.plan(dim, n_items)
    three_blocks = len(plan.ranks) == 3
    if three_blocks and base.cutoffs is None:
        variations += [{"cutoffs": shares} for shares in ((0.05, 0.2), (0.25, 0.5))]
    if three_blocks and base.ranks is None:
        halves = tuple(max(1, rank // 2) for rank in plan.ranks)
        doubles = tuple(min(dim, 2 * rank) for rank in plan.ranks)
        variations += [{"ranks": ranks} for ranks in (halves, doubles)]
    return [replace(base, **variation) for variation in variations]


def _row(kind: str, found: Estimate, uncompressed: Estimate, sharing: str) -> dict[str, str]:
    plan, sizes = found.plan, found.sizes
    ends = "/".join(f"{end:,}" for end in plan.cutoffs)
    return {
        "softmax": kind,
        "ranks": "/".join(map(str, plan.ranks)),
        "block ends": ends if len(plan.cutoffs) <= _SHOWN_ENDS else f"{len(plan.cutoffs)} blocks",
        "sharing": sharing,
        "table": f"{sizes.table:,}",
        "layers": f"{sizes.layers:,}",
        "softmax +": f"{sizes.softmax:,}",
        "parameters": f"{sizes.total:,}",
        "MB": f"{found.megabytes:,.2f}",
        "smaller": f"{uncompressed.sizes.total / sizes.total:.1f}x",
        "MFLOP": f"{found.score_flops / 1e6:,.2f}",
    }
