"""A study as one page, `compare.html`, that is read without a network."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io import templates
from plotly.offline import get_plotlyjs

from cprec_recbole.compare.results import Findings, Point, Run, Standing, Table, in_order, listed

_SCHEMES = {"light": "plotly_white", "dark": "plotly_dark"}


def render_page(findings: Findings) -> str:
    """The page's HTML: sentences, tables, and the figures that its script draws."""
    standings, finished = findings.standings, findings.finished
    own = [s for s in standings if s.contender == findings.subject and s.smaller]
    metrics = sorted({str(run.record.get("curve_metric", "ndcg@20")).upper() for run in finished})
    study = {
        "contenders": in_order(run.goal.contender for run in finished),
        "cells": [_cell(table) for table in findings.tables],
        "metric": " and ".join(metrics),
        "templates": {s: templates[name].layout.to_plotly_json() for s, name in _SCHEMES.items()},
    }
    engine = Environment(loader=PackageLoader(__name__, ""), autoescape=True, trim_blocks=True)
    engine.undefined, engine.lstrip_blocks = StrictUndefined, True
    engine.filters.update(listed=listed, counted=_counted)
    engine.filters["middle"] = lambda values: median(values) if values else None
    rivals = in_order(standing.contender for standing in standings if standing.below)
    return engine.get_template("page.html").render(
        findings=findings,
        goals=[run.goal for run in finished or findings.failed],
        own=own,
        first=max(own, key=lambda s: (len(s.smaller), -(s.ratio or 0)), default=None),
        rivals=[_rival([s for s in standings if s.contender == name]) for name in rivals],
        groups=list(dict.fromkeys(group for standing in standings for group in standing.groups)),
        smaller_than=_smaller_than,
        machine=_machine,
        machines=list(dict.fromkeys(map(_machine, finished))),
        study=study,
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
    )


def _cell(table: Table) -> dict[str, Any]:
    """What the script draws of a cell."""
    ratios = sorted({point.ratio for point in table.points if point.ratio is not None})
    return {
        **{name: str(value) for name, value in table.cell._asdict().items()},
        "ratios": [f"{ratio:g}" for ratio in ratios] or [""],
        "points": [_point(point) for point in table.points],
    }


def _point(point: Point) -> dict[str, Any]:
    records, time = [run.record for run in point.runs], point.figure("score_ms")
    groups = {name: point.figure(f"popularity: {name}") for name in point.groups}
    curves = zip(*(record["valid_curve"] for record in records if record.get("valid_curve")))
    parts = dict.fromkeys(part for record in records for part in record["parameters"])
    step = records[0].get("eval_step", 1)
    return {
        "contender": point.contender,
        "ratio": None if point.ratio is None else f"{point.ratio:g}",
        "label": point.label,
        "quality": point.quality,
        "parameters": point.parameters,
        "bytes": point.size,
        "ms": time and time.mean,
        "groups": {name: found for name, found in groups.items() if found and found.mean > 0},
        "parts": {part: mean(r["parameters"].get(part, 0) for r in records) for part in parts},
        "curve": [(step * (i + 1), mean(scores)) for i, scores in enumerate(curves)],
    }


def _smaller_than(whole: Point | None, points: Sequence[Point]) -> list[tuple[float, Point]]:
    """Points smaller than the uncompressed model, by size, after their shares of its quality."""
    found = sorted((p for p in points if whole and p.size < whole.size), key=lambda p: p.size)
    return [(point.share() or 0.0, point) for point in found]


def _rival(standings: Sequence[Standing]) -> str:
    """One contender at all ratios: `narrower in 8 of 9 (5 beyond chance)`."""
    below = [is_below for standing in standings for is_below in standing.below]
    sure = [difference.verdict for standing in standings for difference in standing.to_subject]
    of = f" of {len(sure)}" * (len(sure) != len(below))
    contrary = f", {sure.count('better')} below it beyond chance" * ("better" in sure)
    beyond = f" ({sure.count('worse')}{of} beyond chance{contrary})" * bool(sure)
    return f"{standings[0].contender} in {sum(below)} of {len(below)}{beyond}"


def _machine(run: Run) -> str:
    known = run.record.get("environment", {}).items()
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in known if v is not None) or "unknown"


def _counted(count: int, noun: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
