"""What a study found as CSV, Markdown and LaTeX, and its page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cprec_recbole.compare.findings import Findings, findings_of
from cprec_recbole.compare.findings.points import Cell, Point
from cprec_recbole.compare.findings.runs import StudyRun
from cprec_recbole.compare.findings.searches import Searches
from cprec_recbole.compare.findings.standings import OURS, paired
from cprec_recbole.compare.page import render_page
from cprec_recbole.compare.results import QUALITY, UNCOMPRESSED
from cprec_recbole.compare.statistics import LEVEL, RESAMPLES, Difference
from cprec_recbole.compare.study.store import write_text
from cprec_recbole.compare.users import PARTS

_ABOUT = (
    *("key", "dataset", "model", "length", "seed", "contender", "ratio", "learning_rate"),
    *("total_parameters", "bytes", "best_epoch", "epochs", "score_ms"),
)
_HEADER = (
    *("contender", "ratio", "seeds", "parameters", "smaller", "NDCG@20 test"),
    *("to uncompressed", "verdict"),
)

_SEARCH = (
    " with the search of learning rates: the first seed is trained at each rate, and the rate that "
    "is best on validation is used for all seeds"
)


def write_summary(folder: Path, *, latex: bool = False, against: str | None = None) -> list[Path]:
    """Write `compare.csv`, `compare.md`, with `latex` also `compare.tex`, and the page
    `compare.html`; returns what was written.

    Args:
        folder: of a study.
        latex: whether tables for LaTeX are wanted.
        against: the contender that others are measured against beside the uncompressed model;
            None: of ours the one that was run most often.

    Raises:
        CompressionError: a folder without runs, without a run of `against`, or with a file that
            cannot be read.
    """
    findings = findings_of(folder, against)
    texts = {"compare.csv": as_csv(findings), "compare.md": as_markdown(findings)}
    if latex:
        texts["compare.tex"] = as_latex(findings)
    texts["compare.html"] = render_page(findings)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def as_csv(findings: Findings) -> str:
    """A row for each run; runs that failed have their error and no figures."""
    finished = [run.content for run in findings.finished]
    metrics = list(dict.fromkeys(m for run in finished for m in run["test"]))
    parts = list(dict.fromkeys(p for run in finished for p in run["parameters"]))
    text = io.StringIO()
    rows = [_csv_row(run.content, metrics, parts) for run in [*findings.finished, *findings.failed]]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(run: dict[str, Any], metrics: Sequence[str], parts: Sequence[str]) -> dict[str, Any]:
    row = {name: run.get(name) for name in _ABOUT}
    row |= {name: run.get("environment", {}).get(name) for name in ("processor", "gpu")}
    blocks = run.get("blocks") or {}  # runs of before did not say
    row |= {f"block_{n}": "/".join(map(str, blocks.get(n, []))) for n in ("items", "ranks")}
    row["sharing"] = run.get("sharing")
    row |= {f"parameters_{part}": run.get("parameters", {}).get(part) for part in parts}
    row |= {f"{s}_{m}": run.get(s, {}).get(m) for s in ("valid", "test") for m in metrics}
    seconds = run.get("epoch_seconds")
    row["epoch_seconds"] = median(seconds) if seconds else None
    for part in PARTS:
        found = run.get("popularity", {}).get(part, {})
        row |= {f"{part}_{name}": found.get(name) for name in ("ndcg@20", "hit@20", "cases")}
    return {**row, "error": run.get("error")}


def as_markdown(findings: Findings) -> str:
    """A table for each cell, what the figures are, and what failed."""
    lines = ["# Study", "", *_notes(findings), "", *_overview(findings)]
    for cell in findings.cells:
        lines += [f"## {_title(cell)}", "", "| " + " | ".join(_header(findings)) + " |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|---|--:|"]
        lines += ["| " + " | ".join(_texts(cell, point)) + " |" for point in _sorted(cell)]
        lines += [""]
    if findings.failed:
        lines += ["## Failed", ""]
        lines += [*_failures(findings.failed), ""]
    return "\n".join(lines)


def _sorted(cell: Cell) -> list[Point]:
    """The uncompressed model, what has no ratio, then ratio by ratio ours before the controls."""
    ours = [UNCOMPRESSED, *OURS]

    def place(point: Point) -> tuple[Any, ...]:
        known = ours.index(point.contender) if point.contender in ours else len(ours)
        return known > 0, point.ratio or 0.0, known, point.contender, point.remark

    return sorted(cell.points, key=place)


def _overview(findings: Findings) -> list[str]:
    """A table for each ratio and one for none: cells by contenders, as shares of the uncompressed
    model's NDCG@20."""
    if not any(cell.reference for cell in findings.cells):
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
    points = [point for cell in findings.cells for point in _sorted(cell)]
    for ratio in sorted({point.ratio for point in points}, key=lambda ratio: ratio or 0):
        names = dict.fromkeys(_name(point) for point in points if point.ratio == ratio)
        names = {UNCOMPRESSED: None, **names} if ratio is None else names
        rows = [_overview_row(cell, ratio, list(names)) for cell in findings.cells]
        heading = "" if ratio is None else f"÷ {ratio:g}"
        found += [f"| {' | '.join([heading, 'users', 'seeds', *names])} |"]
        found += [f"|---|{'--:|' * (2 + len(names))}", *filter(None, rows), ""]
    return found


def _overview_row(cell: Cell, ratio: float | None, names: Sequence[str]) -> str | None:
    """A cell's row; None where none of these was run in it."""
    by_name = {_name(point): point for point in cell.points if point.ratio == ratio}
    if not by_name:
        return None
    seeds = 0 if cell.reference is None else len(cell.reference.runs)
    texts = [_share(cell, by_name.get(name)) for name in names]
    place = f"{cell.model}, {cell.dataset}, {cell.length}"
    return f"| {' | '.join([place, _users(cell), str(seeds), *texts])} |"


def _share(cell: Cell, point: Point | None) -> str:
    """A point's NDCG@20 by the uncompressed model's, and the interval of that."""
    if point is None:
        return ""
    if point is cell.reference:
        return _quality(point)
    found = point.interval
    both = cell.reference and paired(point, cell.reference, lambda run: run.test[QUALITY])
    if cell.reference is None or found is None or not both or not both[1]:
        return "–"  # nothing to divide by
    of, low, high = (round(100 * (1 + x / both[1])) for x in (found.mean, found.low, found.high))
    few = f" [{found.seeds}]" if found.seeds < len(cell.reference.runs) else ""
    return f"{of}% ({low} to {high}){few}"


def _failures(failed: Sequence[StudyRun]) -> list[str]:
    """What failed for the same reason, in one line."""
    groups: dict[tuple[str, str], list[StudyRun]] = {}
    for run in failed:
        ratio = "" if run.ratio is None else f", ratio {run.ratio:g}"
        place = f"{run.model} on {run.dataset}, length {run.length}{ratio}"
        groups.setdefault((place, str(run.error)), []).append(run)
    lines = []
    for (place, error), runs in groups.items():
        names = ", ".join(dict.fromkeys(run.contender for run in runs))
        seeds = ", ".join(str(seed) for seed in sorted({run.seed or 0 for run in runs}))
        lines.append(f"- {place}: {names} (seeds {seeds}): {error}")
    return lines


def _notes(findings: Findings) -> list[str]:
    subject, searches = findings.subject, Searches(findings.cells)
    to_subject = (
        f" and *to {subject}* (at the same ratio, or where that has none)" if subject else ""
    )
    machines = dict.fromkeys(_machine(run.environment) for run in findings.finished)
    unequal = searches.unequal
    alone = [run.key for run in findings.finished if not run.users_path.exists()]
    return [
        f"{len(findings.finished)} runs finished, {len(findings.failed)} failed; "
        f"{searches.trainings} trainings in all"
        f"{_SEARCH if searches.several else ', at one learning rate'}.{_edges(searches)}",
        "",
        "*Smaller*: bytes of the weights as they are kept, of the uncompressed model over the "
        "contender's. *NDCG@20 test*: mean ± standard deviation over seeds. *To uncompressed*"
        f"{to_subject}: mean difference of NDCG@20 over the test users, "
        f"a user's difference averaged over seeds, with the {LEVEL:.0%} interval of {RESAMPLES:,} "
        "bootstrap samples of users. *Verdict*: `worse` or `better` where the interval to "
        "uncompressed leaves zero out, else `not told apart`: the interval says how large a "
        "difference may still be. Intervals are of these trainings; others would differ, as seeds "
        "do. One in twenty misses by chance.",
        "",
        *(["Learning rates were not searched alike for all:", ""] if unequal else []),
        *[f"- {sentence}" for sentence in unequal],
        *([""] if unequal else []),
        *(
            [f"Without each test user's NDCG@20, and so without intervals: {', '.join(alone)}.", ""]
            if alone
            else []
        ),
        *[f"On {machine}." for machine in machines],
    ]


def _edges(searches: Searches) -> str:
    """Whether the rates that were tried were enough."""
    highest, lowest, ended = searches.edges
    if not highest + lowest:
        return ""
    return (
        f" The highest rate that was tried won {highest} of {ended} searches, the lowest "
        f"{lowest}: there, rates beyond it may be better still, and can be added to the study."
    )


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{n} {environment.get(n)}" for n in ("recbole", "torch", "numpy", "python")
    )
    hardware = environment.get("gpu") or environment.get("processor")
    return f"{hardware}, one thread a run; {versions}"


def _title(cell: Cell) -> str:
    return f"{cell.model} on {cell.dataset}, length {cell.length} ({_users(cell)} test users)"


def _users(cell: Cell) -> str:
    return "?" if cell.users is None else f"{cell.users:,}"


def _name(point: Point) -> str:
    return f"{point.contender}{point.remark}"


def _texts(cell: Cell, point: Point) -> list[str]:
    ratio = "" if point.ratio is None else f"{point.ratio:g}"
    smaller = f"{cell.reference.size / point.size:.2f}" if cell.reference else ""
    verdict = "" if point.interval is None else point.interval.verdict
    return [
        *(_name(point), ratio, str(len(point.runs)), f"{point.parameters:,.0f}", smaller),
        _quality(point),
        *(_interval(point.interval), verdict, _interval(point.to_subject)),
    ]


def _quality(point: Point) -> str:
    found = point.quality
    return f"{found.mean:.4f}" + ("" if math.isnan(found.spread) else f" ± {found.spread:.4f}")


def _header(findings: Findings) -> tuple[str, ...]:
    return (*_HEADER, f"to {findings.subject}" if findings.subject else "")


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def as_latex(findings: Findings) -> str:
    """The tables of the cells for LaTeX; they need the package booktabs."""
    lines = ["% needs \\usepackage{booktabs}"]
    for cell in findings.cells:
        lines += [
            "\\begin{table}",
            f"\\caption{{{_escaped(_title(cell))}}}",
            "\\begin{tabular}{lrrrrrrlr}",
            "\\toprule",
            " & ".join(_escaped(name) for name in _header(findings)) + " \\\\",
            "\\midrule",
            *(
                " & ".join(_escaped(text) for text in _texts(cell, point)) + " \\\\"
                for point in _sorted(cell)
            ),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("±", "$\\pm$").replace("÷", "$\\div$")
