"""Where parameters and quality are: parts of a model, and items by popularity."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import plotly.graph_objects as go

from cprec_recbole.compare.findings.points import Cell, Point
from cprec_recbole.compare.findings.standings import in_group, paired
from cprec_recbole.compare.page.drawing import (
    QUALITY_TITLE,
    Picture,
    axis,
    bars,
    marker,
    picture,
    safe,
    short,
    span,
    with_spread,
)
from cprec_recbole.compare.page.styles import Style, Styles
from cprec_recbole.compare.results import Figure

HIGHEST_SHARE = 300  # percent
# shades of the parts of a model, with a pattern beside the shade
PARTS = (
    ("var(--part-1)", ""),
    ("var(--part-2)", "/"),
    ("var(--part-3)", "."),
    ("var(--part-4)", "x"),
)


def parts_picture(cell: Cell, ratio: float | None) -> tuple[Picture, list[str]] | None:
    """Parameters by part, a bar for each contender, and the names of the parts."""
    points = [p for p in cell.at(ratio) if any(run.parts for run in p.runs)]
    if not points:
        return None
    points.sort(key=lambda p: p.parameters)
    names = list(
        dict.fromkeys(n for p in points for run in p.runs for n, v in run.parts.items() if v)
    )
    if not names:
        return None
    # every point has a bar of its own, also where labels are equal
    labels = [safe(p.label) for p in points]
    traces = []
    for i, name in enumerate(names):
        shade, pattern = PARTS[i % len(PARTS)]
        sizes = [mean(run.parts.get(name, 0) for run in p.runs) for p in points]
        traces.append(
            go.Bar(
                y=list(range(len(points))),
                x=sizes,
                orientation="h",
                name=safe(name),
                hoverinfo="text",
                hovertext=[
                    f"<b>{label}</b><br>{safe(name)} {size:,.0f}"
                    for label, size in zip(labels, sizes)
                ],
                marker={
                    "color": shade,
                    "pattern": {
                        "shape": pattern,
                        "fillmode": "overlay",
                        "fgcolor": "var(--paper)",
                        "size": 6,
                    },
                    "line": {"width": 0.6, "color": "var(--ink)"},
                },
            )
        )
    totals = [p.parameters for p in points]
    traces.append(_totals(totals, cell.reference))
    drawn = picture(
        traces,
        height=110 + 26 * len(points),
        barmode="stack",
        bargap=0.35,
        xaxis=axis(
            "parameters", range=[0, 1.5 * max(totals)], nticks=5, tickangle=0, tickformat="~s"
        ),
        yaxis=axis(
            "",
            tickvals=list(range(len(points))),
            ticktext=[safe(_shortened(p.label)) for p in points],
            ticks="",
            showgrid=False,
        ),
    )
    return drawn, names


def _shortened(label: str, longest: int = 24) -> str:
    return label if len(label) <= longest else f"{label[: longest - 1]}…"


def _totals(totals: list[float], reference: Point | None) -> go.Scatter:
    """The sum of each bar, written at its end."""
    texts = [short(total) for total in totals]
    if reference is not None:
        smaller = [reference.parameters / total if total > 0 else 1 for total in totals]
        texts = [
            text if 0.95 < times < 1.05 else f"{text} (÷ {times:.1f})"
            for text, times in zip(texts, smaller)
        ]
    return go.Scatter(
        x=totals,
        y=list(range(len(totals))),
        mode="text",
        text=[f" {text}" for text in texts],
        textposition="middle right",
        textfont={"size": 11},
        cliponaxis=False,
        hoverinfo="skip",
    )


def popularity_picture(cell: Cell, styles: Styles, ratio: float | None) -> Picture | None:
    """Quality by popularity of the item asked for, as a share of the uncompressed model's.

    The quality itself is shown where there is no uncompressed model, and where a share is above
    300%: then the uncompressed model has next to nothing there, and shares say nothing.
    """
    points = [p for p in cell.at(ratio) if any(run.popularity for run in p.runs)]
    if not points:
        return None
    groups = list(dict.fromkeys(g for p in points for run in p.runs for g in run.popularity))
    width = 0.76 / len(points)
    whole = cell.reference
    shares = [_shares(point, groups, whole) for point in points]
    if not any(f for figures in shares for f in figures) or any(
        f.mean > HIGHEST_SHARE for figures in shares for f in figures if f
    ):
        whole = None
        shares = [[point.figure(in_group(group)) for group in groups] for point in points]
    traces = [_level(len(groups))] if whole else []
    for i, (point, figures) in enumerate(zip(points, shares)):
        places = [g - 0.38 + (i + 0.5) * width for g in range(len(groups))]
        traces.append(_groups(point, styles[point.contender], groups, places, figures))
    limits = span(figure for figures in shares for figure in figures)
    ticks = [f"{safe(group)}{_cases(points, group)}" for group in groups]
    return picture(
        traces,
        height=400,
        xaxis=axis(
            "popularity of the item asked for",
            range=[-0.5, len(groups) - 0.5],
            tickvals=list(range(len(groups))),
            ticktext=ticks,
            showgrid=False,
            ticks="",
        ),
        yaxis=axis("NDCG@20, share of uncompressed", ticksuffix="%", range=limits)
        if whole
        else axis(QUALITY_TITLE, range=limits),
    )


def _shares(point: Point, groups: Sequence[str], whole: Point | None) -> list[Figure | None]:
    """A point's quality in each group, in percent of another one's over the seeds that both have;
    None where that has nothing there."""
    found: list[Figure | None] = []
    for group in groups:
        own = point.figure(in_group(group))
        both = None if whole is None else paired(point, whole, in_group(group))
        if own is None or both is None or both[1] <= 0:
            found.append(None)
        else:
            found.append(Figure(100 * both[0] / both[1], 100 * own.spread / both[1]))
    return found


def _groups(
    point: Point,
    style: Style,
    groups: Sequence[str],
    places: Sequence[float],
    shares: Sequence[Figure | None],
) -> go.Scatter:
    figures = [point.figure(in_group(group)) for group in groups]
    return go.Scatter(
        x=places,
        y=[None if f is None else f.mean for f in shares],
        error_y=bars(shares, style.colour),
        mode="markers",
        marker=marker(style, 9),
        hoverinfo="text",
        hovertext=[
            f"<b>{safe(point.label)}</b><br>{safe(group)}: NDCG@20 {with_spread(f, '.4f')}"
            for group, f in zip(groups, figures)
        ],
        name=safe(point.label),
        meta=point.contender,
    )


def _cases(points: Sequence[Point], group: str) -> str:
    cases = [run.cases[group] for p in points for run in p.runs if group in run.cases]
    return f"<br>{max(cases):,.0f} cases" if cases else ""


def _level(groups: int) -> go.Scatter:
    """The line of 100% across each group."""
    x = [place for i in range(groups) for place in (i - 0.44, i + 0.44, None)]
    line = {"color": "var(--ink)", "width": 1, "dash": "dot"}
    y = [100, 100, None] * groups
    return go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", name="uncompressed")
