"""The summary of a study as CSV, Markdown and LaTeX, and its page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from cprec_recbole.compare.page import write_page
from cprec_recbole.compare.statistics import LEVEL, RESAMPLES, Difference, paired_difference
from cprec_recbole.compare.study.spec import UNCOMPRESSED
from cprec_recbole.compare.study.store import write_text
from cprec_recbole.compare.study.summary import CellSummary, Line, Run, Summary, summarise
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
    " with the search of learning rates, which is the same for every contender: the first seed is "
    "trained at each rate, and the rate that is best on validation is used for all seeds"
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
        CompressionError: a folder without runs, or without a run of `against`.
    """
    summary = summarise(folder, against)
    texts = {"compare.csv": as_csv(summary), "compare.md": as_markdown(summary)}
    if latex:
        texts["compare.tex"] = as_latex(summary)
    for name, text in texts.items():
        write_text(folder / name, text)
    written = [folder / name for name in texts]
    page = folder / "compare.html"
    write_page(folder, page, paired_interval=paired_difference, against=against)
    return [*written, page]


def as_csv(summary: Summary) -> str:
    """A row for each run; runs that failed have their error and no figures."""
    runs = [*summary.runs, *summary.failed]
    metrics = list(dict.fromkeys(m for run in summary.runs for m in run["test"]))
    parts = list(dict.fromkeys(p for run in summary.runs for p in run["parameters"]))
    text = io.StringIO()
    rows = [_csv_row(run, metrics, parts) for run in runs]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(run: Run, metrics: Sequence[str], parts: Sequence[str]) -> dict[str, Any]:
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


def as_markdown(summary: Summary) -> str:
    """A table for each cell, what the figures are, and what failed."""
    lines = ["# Study", "", *_notes(summary), "", *_overview(summary)]
    for cell in summary.cells:
        lines += [f"## {_title(cell)}", "", "| " + " | ".join(_header(summary)) + " |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|---|--:|"]
        lines += ["| " + " | ".join(_cells(line)) + " |" for line in cell.lines]
        lines += [""]
    if summary.failed:
        lines += ["## Failed", ""]
        lines += [*_failures(summary.failed), ""]
    return "\n".join(lines)


def _overview(summary: Summary) -> list[str]:
    """A table for each ratio and one for none: cells by contenders, as shares of the uncompressed
    model's NDCG@20."""
    lines = [line for cell in summary.cells for line in cell.lines]
    if not any(line.contender == UNCOMPRESSED for line in lines):
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
    for ratio in sorted({line.ratio for line in lines}, key=lambda ratio: ratio or 0):
        names = dict.fromkeys(line.contender for line in lines if line.ratio == ratio)
        names = {UNCOMPRESSED: None, **names} if ratio is None else names
        rows = [_overview_row(cell, ratio, list(names)) for cell in summary.cells]
        heading = "" if ratio is None else f"÷ {ratio:g}"
        found += [f"| {' | '.join([heading, 'users', 'seeds', *names])} |"]
        found += [f"|---|{'--:|' * (2 + len(names))}", *filter(None, rows), ""]
    return found


def _overview_row(cell: CellSummary, ratio: float | None, names: Sequence[str]) -> str | None:
    """A cell's row; None where none of these was run in it."""
    plain = next((line for line in cell.lines if line.contender == UNCOMPRESSED), None)
    by_name = {line.contender: line for line in cell.lines if line.ratio == ratio}
    if not by_name:
        return None
    seeds = 0 if plain is None else len(plain.seeds)
    texts = [_share(by_name.get(name), seeds) for name in names]
    place = f"{cell.model}, {cell.dataset}, {cell.length}"
    return f"| {' | '.join([place, f'{cell.users:,}', str(seeds), *texts])} |"


def _share(line: Line | None, seeds: int) -> str:
    if line is None:
        return ""
    if line.contender == UNCOMPRESSED:
        return _quality(line)
    if line.share is None or line.to_uncompressed is None:
        return "–"  # nothing to divide by
    of, low, high = (round(100 * value) for value in line.share)
    common = line.to_uncompressed.seeds
    few = f" [{common}]" if common < seeds else ""
    return f"{of}% ({low} to {high}){few}"


def _failures(failed: Sequence[Run]) -> list[str]:
    """What failed for the same reason, in one line."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in failed:
        ratio = "" if run["ratio"] is None else f", ratio {run['ratio']:g}"
        place = f"{run['model']} on {run['dataset']}, length {run['length']}{ratio}"
        groups.setdefault((place, run["error"]), []).append(run)
    lines = []
    for (place, error), runs in groups.items():
        names = ", ".join(dict.fromkeys(run["contender"] for run in runs))
        seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
        lines.append(f"- {place}: {names} (seeds {seeds}): {error}")
    return lines


def _notes(summary: Summary) -> list[str]:
    to_subject = (
        f" and *to {summary.subject}* (at the same ratio, or at none)" if summary.subject else ""
    )
    machines = dict.fromkeys(_machine(run["environment"]) for run in summary.runs)
    return [
        f"{len(summary.runs)} runs finished, {len(summary.failed)} failed; {summary.trainings} "
        f"trainings in all{_SEARCH if summary.is_searched else ', at one learning rate'}."
        f"{_edges(summary)}",
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
        *[f"On {machine}." for machine in machines],
    ]


def _edges(summary: Summary) -> str:
    """Whether the rates that were tried were enough."""
    highest, lowest, searches = summary.edges
    if not highest + lowest:
        return ""
    return (
        f" The highest rate that was tried won {highest} of {searches} searches, the lowest "
        f"{lowest}: there, rates beyond it may be better still, and can be added to the study."
    )


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{n} {environment.get(n)}" for n in ("recbole", "torch", "numpy", "python")
    )
    hardware = environment.get("gpu") or environment.get("processor")
    return f"{hardware}, one thread a run; {versions}"


def _title(cell: CellSummary) -> str:
    return f"{cell.model} on {cell.dataset}, length {cell.length} ({cell.users:,} test users)"


def _cells(line: Line) -> list[str]:
    ratio = "" if line.ratio is None else f"{line.ratio:g}"
    smaller = "" if line.smaller is None else f"{line.smaller:.2f}"
    verdict = "" if line.to_uncompressed is None else line.to_uncompressed.verdict
    return [
        *(line.contender, ratio, str(len(line.seeds)), f"{line.parameters:,.0f}", smaller),
        _quality(line),
        *(_interval(line.to_uncompressed), verdict, _interval(line.to_subject)),
    ]


def _quality(line: Line) -> str:
    return f"{mean(line.test):.4f}" + ("" if line.spread is None else f" ± {line.spread:.4f}")


def _header(summary: Summary) -> tuple[str, ...]:
    return (*_HEADER, f"to {summary.subject}" if summary.subject else "")


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def as_latex(summary: Summary) -> str:
    """The tables of the cells for LaTeX; they need the package booktabs."""
    lines = ["% needs \\usepackage{booktabs}"]
    for cell in summary.cells:
        lines += [
            "\\begin{table}",
            f"\\caption{{{_escaped(_title(cell))}}}",
            "\\begin{tabular}{lrrrrrrlr}",
            "\\toprule",
            " & ".join(_escaped(name) for name in _header(summary)) + " \\\\",
            "\\midrule",
            *(" & ".join(_escaped(text) for text in _cells(line)) + " \\\\" for line in cell.lines),
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
