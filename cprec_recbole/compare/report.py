"""What a study found: on the terminal, as Markdown, CSV and LaTeX, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table as Screen

from cprec_recbole.compare import results
from cprec_recbole.compare.contenders import UNCOMPRESSED
from cprec_recbole.compare.page import render_page
from cprec_recbole.compare.results import Figure, Findings, Point, Run, Table
from cprec_recbole.compare.spec import QUALITY
from cprec_recbole.files import write_text
from cprec_recbole.training.ranking import PARTS

_FIT = 5  # contenders, each in columns of its own, in the width of a terminal's table
_PARTS = ("table", "layers", "softmax")
_COSTS = {  # labels, figures of runs, and how they are written
    **{f"parameters: {part}": (f"parameters: {part}", ",.0f") for part in _PARTS},
    "parameters": ("parameters", ",.0f"),
    "bytes of weights": ("bytes", ",.0f"),
    "saved weights (bytes)": ("weight_bytes", ",.0f"),
    "RecBole checkpoint (bytes)": ("checkpoint_bytes", ",.0f"),
    "seconds an epoch": ("epoch_seconds", ".2f"),
    "epochs to the best": ("best_epoch", ".1f"),
    "ms to score a user": ("score_ms", ".2f"),
}


def write_report(findings: Findings, folder: Path, *, latex: bool = False) -> list[Path]:
    """Write `compare.csv`, `compare.md`, with `latex` also `compare.tex`, and the page
    `compare.html` into a folder; returns what was written."""
    texts = {"compare.csv": as_csv(findings), "compare.md": as_markdown(findings)}
    texts |= {"compare.tex": as_latex(findings)} if latex else {}
    texts["compare.html"] = render_page(findings)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def as_csv(findings: Findings) -> str:
    """A row for each run; runs that failed have their error and no figures."""
    finished = findings.finished
    metrics = list(dict.fromkeys(m for run in finished for m in run.record["test"]))
    rows = [_csv_row(run, metrics) for run in [*finished, *findings.failed]]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def _csv_row(run: Run, metrics: Sequence[str]) -> dict[str, Any]:
    goal, record = run.goal, run.record
    row = {"key": goal.key, **goal.cell._asdict(), "seed": goal.seed}
    row |= {"contender": goal.contender, "ratio": goal.ratio}
    parts, seconds = record.get("parameters", {}), record.get("epoch_seconds")
    row["learning_rate"] = record.get("learning_rate")
    row["total_parameters"] = sum(parts.values()) if parts else None
    row |= {name: record.get(name) for name in ("bytes", "best_epoch", "epochs", "score_ms")}
    row |= {name: record.get("environment", {}).get(name) for name in ("processor", "gpu")}
    blocks = record.get("blocks") or {}  # runs of before did not say
    row |= {f"block_{n}": "/".join(map(str, blocks.get(n, []))) for n in ("items", "ranks")}
    row["sharing"] = record.get("sharing")
    row |= {f"parameters_{part}": parts.get(part) for part in _PARTS}
    row |= {f"{s}_{m}": record.get(s, {}).get(m) for s in ("valid", "test") for m in metrics}
    row["epoch_seconds"] = float(pd.Series(seconds).median()) if seconds else None
    for part in PARTS:
        found = record.get("popularity", {}).get(part, {})
        row |= {f"{part}_{name}": found.get(name) for name in (QUALITY, "hit@20", "cases")}
    return {**row, "coverage": record.get("coverage"), "error": record.get("error")}


def as_markdown(findings: Findings) -> str:
    """The metrics and costs of a single comparison; for a study shares over its cells; a table for
    each cell; what the figures are, and what failed."""
    lines = []
    if findings.study.spec.is_single and findings.tables:
        lines = [f"# {_title(findings)}", "", f"Repeat it with `{findings.study.command}`.", ""]
        lines += [*_markdown(_by_quantity(findings)), _note(findings)]
        lines += ["", "Contenders:", ""]
        for point in findings.tables[0].points:
            options = findings.study.made(point.runs[0].goal)["options"]
            words = [f"{name} {value}" for name, value in options.items() if value is not None]
            sharing = point.runs[0].record.get("sharing")
            lines.append(f"- {point.label}: {', '.join(words)} ({sharing})")
        lines.append("")
    lines += ["## Differences" if lines else "# Study", "", *_notes(findings), ""]
    lines += _overview(findings)
    for table in findings.tables:
        lines += [f"## {_heading(table)}", "", *_markdown(_rows(findings, table))]
    if findings.failed:
        lines += ["## Failed", "", *(f"- {who}: {why}" for who, why in findings.failures), ""]
    return "\n".join(lines)


def as_latex(findings: Findings) -> str:
    """The tables of the cells for LaTeX; they need the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in findings.tables:
        header, *rows = _rows(findings, table)
        frame = pd.DataFrame(rows, columns=header)
        parts.append(frame.to_latex(index=False, escape=True, caption=_heading(table)))
    return "\n".join(parts)


def as_screen(findings: Findings) -> Screen:
    """A single comparison for a terminal: mean and spread of each contender, and its ratio to the
    first. Where contenders are too many for columns, a row for each, with what matters most."""
    header, *rows = _by_quantity(findings)
    points = findings.tables[0].points
    are_many = len(points) > (_FIT if len(findings.study.spec.seeds) == 1 else _FIT - 1)
    if are_many:
        highest = max((int(r[0].split("@")[1]) for r in rows if "@" in r[0]), default=0)
        names = (f"HR@{highest}", f"NDCG@{highest}", "bytes of weights", "ms to score a user")
        shown = [row for row in rows if row[0] in names]
        header = ["", *(text for row in shown for text in (row[0], "ratio"))]
        rows = [[point.label] for point in points]
        for i, row in enumerate(rows):
            at = max(1, 2 * i)  # behind the label: the first has no ratio
            row += [text for r in shown for text in (r[at], r[at + 1] if i else "")]
    sharing = ", ".join(f"{point.label} {point.runs[0].record['sharing']}" for point in points)
    caption = f"{_note(findings)}\nSets of layer parameters kept / layers: {sharing}."
    screen = Screen(
        title=_title(findings), caption=caption, title_justify="left", caption_justify="left"
    )
    for index, text in enumerate(header):
        side = "right" if index else "left"
        screen.add_column(text, justify=side, no_wrap=are_many or index > 0)  # type: ignore[arg-type]
    for row in rows:
        screen.add_row(*row)
    return screen


def _by_quantity(findings: Findings) -> list[list[str]]:
    """A header, and a row for each metric and cost: the first contender's figure, then those of the
    others, each with its ratio to the first."""
    first, *others = findings.tables[0].points
    metrics = {m.upper().replace("HIT", "HR"): (m, ".4f") for m in first.runs[0].record["test"]}
    rows = [["", first.label, *(text for p in others for text in (p.label, "ratio"))]]
    for label, (name, form) in (metrics | _COSTS).items():
        base, *figures = (point.figure(name) for point in (first, *others))
        row = [label, format(base, form) if base else "-"]
        for figure in figures:
            row += [format(figure, form) if figure else "-", _ratio(figure, base)]
        rows += [row] if any((base, *figures)) else []  # what was not measured has no row
    return rows


def _ratio(figure: Figure | None, base: Figure | None) -> str:
    """How this compares with the first contender: `x 1.08`, or `÷ 4.9` where it is far smaller."""
    if figure is None or base is None or base.mean == 0:
        return "-"
    ratio = figure.mean / base.mean
    return f"÷ {1 / ratio:.1f}" if 0 < ratio < 0.75 else f"x {ratio:.2f}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, its first row the header; numbers stand on the right."""
    header, *others = rows
    left = {i for i, name in enumerate(header) if i == 0 or name == "verdict"}
    dashes = "|".join("---" if i in left else "--:" for i in range(len(header)))
    lines = [f"| {' | '.join(row)} |" for row in others]
    return [f"| {' | '.join(header)} |", f"|{dashes}|", *lines, ""]


def _title(findings: Findings) -> str:
    cell, about = findings.tables[0].cell, findings.tables[0].about
    counts = f"{about['users']:,} users, {about['items']:,} items"
    return f"{cell.model} on {cell.dataset} ({counts})"


def _note(findings: Findings) -> str:
    """What the figures are: which split, how many seeds, what the spread is."""
    about, seeds = findings.tables[0].about, findings.study.spec.seeds
    over = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"one seed, {seeds[0]}"
    spread = "mean ± standard deviation" if len(seeds) > 1 else "no spread; use --seeds 3"
    split = about["evaluation"]["split"]
    parts = "leave one out" if "LS" in split else f"split {split}"
    ranked = f"all items ranked, {about['test_cases']:,} cases"
    return f"Test set: {parts}, {ranked}; {over} ({spread})."


def _sorted(table: Table) -> list[Point]:
    """The uncompressed model, what has no ratio, then ratio by ratio ours before the controls."""
    ours = [UNCOMPRESSED, *results.OURS]

    def place(point: Point) -> tuple[Any, ...]:
        known = ours.index(point.contender) if point.contender in ours else len(ours)
        return known > 0, point.ratio or 0.0, known, point.contender

    return sorted(table.points, key=place)


def _overview(findings: Findings) -> list[str]:
    """A table for each ratio and one for none: cells by contenders, as shares of the uncompressed
    model's NDCG@20."""
    tables = [table for table in findings.tables if table.reference is not None]
    if not tables or findings.study.spec.is_single:
        return []
    found = [
        "## Shares of the uncompressed model's NDCG@20",
        "",
        "On test; in brackets the ends of the same intervals of differences, as shares of the "
        "uncompressed model's mean, which is held fixed; in square brackets the number of seeds "
        "where the uncompressed model has more. Empty: not run, failed, or no other model than "
        "`compressed`.",
        "",
    ]
    points = [point for table in findings.tables for point in _sorted(table)]
    for ratio in sorted({point.ratio for point in points}, key=lambda ratio: ratio or 0):
        names = list(dict.fromkeys(p.contender for p in points if p.ratio == ratio))
        rows = [["" if ratio is None else f"÷ {ratio:g}", "users", "seeds", *names]]
        for table in findings.tables:
            shares = [_share(table, table.find(name, ratio)) for name in names]
            place = f"{table.cell.model}, {table.cell.dataset}, {table.cell.length}"
            seeds = str(len(table.reference.runs)) if table.reference else "0"
            if any(shares):
                rows.append([place, _users(table), seeds, *shares])
        found += _markdown(rows)
    return found


def _share(table: Table, point: Point | None) -> str:
    """A point's NDCG@20 by the uncompressed model's, and the interval of that."""
    if point is None:
        return ""
    if point is table.reference:
        return f"{point.quality:.4f}"
    found, both = point.interval, point.beside(point.whole)
    if point.whole is None or found is None or not both or not both[1]:
        return "–"  # nothing to divide by
    of, low, high = (round(100 * (1 + x / both[1])) for x in (found.mean, found.low, found.high))
    few = f" [{found.seeds}]" if found.seeds < len(point.whole.runs) else ""
    return f"{of}% ({low} to {high}){few}"


def _notes(findings: Findings) -> list[str]:
    subject, unequal = findings.subject, findings.unequal
    to_subject = (
        f" and *to {subject}* (at the same ratio, or where that has none)" if subject else ""
    )
    machines = dict.fromkeys(_machine(run.record["environment"]) for run in findings.finished)
    alone = [run.goal.key for run in findings.finished if run.users is None]
    search = (
        " with the search of learning rates: the first seed is trained at each rate, and the rate "
        "that is best on validation is used for all seeds"
        if findings.searches
        else ", at one learning rate"
    )
    highest, lowest = findings.edges
    edges = (  # whether the rates that were tried were enough
        f" The highest rate that was tried won {highest} of {len(findings.searches)} searches, the "
        f"lowest {lowest}: there, rates beyond it may be better still, and can be added to the "
        "study."
    )
    return [
        f"{len(findings.finished)} runs finished, {len(findings.failed)} failed; "
        f"{findings.trainings} trainings in all{search}.{edges if highest + lowest else ''}",
        "",
        "*Smaller*: bytes of the weights as they are kept, of the uncompressed model over the "
        "contender's. *NDCG@20 test*: mean ± standard deviation over seeds. *To uncompressed*"
        f"{to_subject}: mean difference of NDCG@20 over the test users, "
        f"a user's difference averaged over seeds, with the {results.LEVEL:.0%} interval of "
        f"{results.RESAMPLES:,} bootstrap samples of users. *Verdict*: `worse` or `better` where "
        "the interval to uncompressed leaves zero out, else `not told apart`: the interval says "
        "how large a difference may still be. Intervals are of these trainings; others would "
        "differ, as seeds do. One in twenty misses by chance. *Head, middle, tail*: test cases by "
        "the item that came next, a third of the training interactions each, from popular to "
        "rare. *Coverage*: how many distinct items are among the first 20 of all test cases.",
        "",
        *(["Learning rates were not searched alike for all:", ""] if unequal else []),
        *[f"- {sentence}" for sentence in unequal],
        *([""] if unequal else []),
        *([f"Without intervals, for want of users: {', '.join(alone)}.", ""] if alone else []),
        *[f"On {machine}." for machine in machines],
    ]


def _machine(environment: dict[str, Any]) -> str:
    packages = ("recbole", "torch", "numpy", "python")
    versions = ", ".join(f"{name} {environment.get(name)}" for name in packages)
    hardware = environment.get("gpu") or environment.get("processor")
    return f"{hardware}, one thread a run; {versions}"


def _by_part(point: Point, name: str, digits: int) -> str:
    """A point's figures of head, middle and tail."""
    found = [point.figure(f"{name}: {part}") for part in PARTS]
    if not any(found):
        return ""
    return " / ".join("–" if each is None else f"{each.mean:.{digits}f}" for each in found)


def _heading(table: Table) -> str:
    return f"{table.cell.label} ({_users(table)} test users)"


def _users(table: Table) -> str:
    found = (run.users for point in table.points for run in point.runs)
    return next((f"{len(users):,}" for users in found if users is not None), "?")


def _rows(findings: Findings, table: Table) -> list[list[str]]:
    """A header, and a row for each point of a cell."""
    to_subject = f"to {findings.subject}" if findings.subject else ""
    rows = [["contender", "ratio", "seeds", "parameters", "smaller", "NDCG@20 test"]]
    rows[0] += ["to uncompressed", "verdict", to_subject]
    rows[0] += [f"{name}, {' / '.join(PARTS)}" for name in ("NDCG@20", "HR@20")] + ["coverage"]
    for point in _sorted(table):
        ratio = "" if point.ratio is None else f"{point.ratio:g}"
        smaller = f"{table.reference.size / point.size:.2f}" if table.reference else ""
        verdict = point.interval.verdict if point.interval else ""
        row = [point.contender, ratio, str(len(point.runs)), f"{point.parameters:,.0f}", smaller]
        row += [f"{point.quality:.4f}", str(point.interval or ""), verdict]
        row += [str(point.to_subject or "")]
        row += [
            _by_part(point, name, digits) for name, digits in (("popularity", 4), ("hit@20", 3))
        ]
        coverage = point.figure("coverage")
        rows.append([*row, f"{coverage.mean:,.0f}" if coverage else ""])
    return rows
