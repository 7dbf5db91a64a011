"""A comparison as a table on the terminal and as Markdown."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from cprec_recbole.compare.results import Comparison, Figure, Row

_FIT = 5  # contenders, each in columns of its own, in the width of a table
_COSTS = ("bytes of weights", "ms to score a user")


def as_table(comparison: Comparison) -> Table:
    """The table for a terminal: mean and spread of each contender, and its ratio to the first.

    Where the contenders are too many for columns there is a row for each, with what matters most.
    """
    sharing = ", ".join(f"{name} {comparison.sharing(name)}" for name in comparison.contenders)
    table = Table(
        title=title(comparison),
        caption=f"{note(comparison)}\nSets of layer parameters kept / layers: {sharing}.",
        title_justify="left",
        caption_justify="left",
    )
    header = _header(comparison)
    rows = [[label, *row] for row, label in zip(*_rows(comparison))]
    are_many = len(comparison.contenders) > (_FIT if len(comparison.seeds) == 1 else _FIT - 1)
    if are_many:
        header, rows = _by_contender(comparison, rows)
    for index, cell in enumerate(header):
        table.add_column(
            cell, justify="left" if index == 0 else "right", no_wrap=are_many or index > 0
        )
    for row in rows:
        table.add_row(*row)
    return table


def _by_contender(
    comparison: Comparison, rows: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """A row for each contender: HR and NDCG (or the first two metrics) at the highest cutoff, and
    what it costs, each with its ratio to the first contender's."""
    metrics = [row for row in rows if "@" in row[0]]
    highest = max((row[0].rpartition("@")[2] for row in metrics), key=int, default="")
    metrics = [row for row in metrics if row[0].endswith(f"@{highest}")]
    shown = [row for row in metrics if row[0].startswith(("HR@", "NDCG@"))] or metrics[:2]
    shown += [row for row in rows if row[0] in _COSTS]
    header = ["", *(cell for row in shown for cell in (row[0], "ratio"))]
    turned = []
    for i, name in enumerate(comparison.contenders):
        at = max(0, 2 * i - 1) + 1  # behind the label: the first has no ratio
        cells = [(row[at], row[at + 1] if i else "") for row in shown]
        turned.append([name, *(cell for pair in cells for cell in pair)])
    return header, turned


def as_markdown(comparison: Comparison) -> str:
    """The same table with how to repeat it, for a paper's appendix or an issue."""
    header = _header(comparison)
    lines = [
        f"# {title(comparison)}",
        "",
        f"Repeat it with `{comparison.command}`.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---", *["--:"] * (len(header) - 1)]) + "|",
    ]
    lines += [f"| {label} | " + " | ".join(row) + " |" for row, label in zip(*_rows(comparison))]
    lines += ["", note(comparison), "", "Contenders:", ""]
    for name, options in comparison.contenders.items():
        words = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
        lines.append(f"- {name}: {words} ({comparison.sharing(name)})")
    if comparison.failed:
        lines += ["", "Failed, and left out:", ""]
        lines += [f"- {name}, {reason}" for name, reason in comparison.failed.items()]
    lines += ["", f"On {_machine(comparison.environment)}."]
    return "\n".join(lines) + "\n"


def title(comparison: Comparison) -> str:
    """What was compared on what."""
    data = comparison.dataset
    model = next(iter(comparison.contenders.values()))["model"].removeprefix("Cp")
    return f"{model} on {data['name']} ({data['users']:,} users, {data['items']:,} items)"


def note(comparison: Comparison) -> str:
    """What the figures are: which split, how many seeds, what the spread is."""
    seeds = comparison.seeds
    over = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"one seed, {seeds[0]}"
    spread = "mean ± standard deviation" if len(seeds) > 1 else "no spread; use --seeds 3"
    cases = f"{comparison.dataset['test_cases']:,} cases"
    return f"Test set: {_evaluation(comparison.dataset['evaluation'])}, {cases}; {over} ({spread})."


def _machine(environment: dict[str, Any]) -> str:
    """Hardware and versions in words."""
    versions = ", ".join(f"{n} {environment[n]}" for n in ("recbole", "torch", "numpy", "python"))
    hardware = environment["gpu"] or environment["processor"]
    threads = f"torch threads {environment['torch_threads']}"
    return f"{hardware}, cores {environment['cores']}, {threads}; {versions}"


def _evaluation(arguments: dict[str, Any]) -> str:
    """RecBole's `eval_args` in words: how the data was split, and what was ranked."""
    split, mode = arguments["split"], arguments["mode"]
    parts = "leave one out" if "LS" in split else f"split {split}"
    test = mode["test"] if isinstance(mode, dict) else mode
    return f"{parts}, {'all items ranked' if test == 'full' else f'mode {test}'}"


def _header(comparison: Comparison) -> list[str]:
    first, *others = comparison.contenders
    return ["", first, *[cell for name in others for cell in (name, "ratio")]]


def _rows(comparison: Comparison) -> tuple[list[list[str]], list[str]]:
    rows = comparison.rows()
    return [_cells(comparison, row) for row in rows], [row.label for row in rows]


def _cells(comparison: Comparison, row: Row) -> list[str]:
    first, *others = comparison.contenders
    base = comparison.figure(first, row.quantity)
    cells = [_write(base, row.form)]
    for name in others:
        figure = comparison.figure(name, row.quantity)
        cells += [_write(figure, row.form), _ratio(figure.mean, base.mean)]
    return cells


def _write(figure: Figure, form: str) -> str:
    if math.isnan(figure.mean):
        return "-"
    if math.isnan(figure.spread) or figure.spread == 0:
        return format(figure.mean, form)
    return f"{figure.mean:{form}} ± {figure.spread:{form}}"


def _ratio(value: float, base: float) -> str:
    """How this compares with the first contender: `x 1.08`, or `÷ 4.9` where it is far smaller."""
    if base == 0 or math.isnan(value) or math.isnan(base):
        return "-"
    ratio = value / base
    return f"÷ {1 / ratio:.1f}" if 0 < ratio < 0.75 else f"x {ratio:.2f}"
