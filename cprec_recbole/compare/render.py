"""A comparison as a table on the terminal and as Markdown."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from cprec_recbole.compare.results import Comparison, Figure, Row


def as_table(comparison: Comparison) -> Table:
    """The table for a terminal: mean and spread of each contender, and its ratio to the first."""
    sharing = ", ".join(f"{name} {comparison.sharing(name)}" for name in comparison.contenders)
    table = Table(
        title=title(comparison),
        caption=f"{note(comparison)}\nSets of layer parameters kept / layers: {sharing}.",
        title_justify="left",
        caption_justify="left",
    )
    for index, cell in enumerate(_header(comparison)):
        table.add_column(cell, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row, label in zip(*_rows(comparison)):
        table.add_row(label, *row)
    return table


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
