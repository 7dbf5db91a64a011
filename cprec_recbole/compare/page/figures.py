"""The pictures of a cell: quality against size and latency, parts, popularity, training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

import plotly.graph_objects as go

from cprec_recbole.compare.page.drawing import (
    QUALITY_TITLE,
    Picture,
    about,
    axis,
    bars,
    log_axis,
    marker,
    picture,
    safe,
    with_spread,
)
from cprec_recbole.compare.page.points import Cell, Point, Quantity, pareto_front
from cprec_recbole.compare.page.runs import StudyRun
from cprec_recbole.compare.page.styles import Style
from cprec_recbole.compare.results import Figure

Styles = dict[str, Style]

# what the size axis shows, by the names of the page's picker
SIZES: dict[str, tuple[Quantity, str, str]] = {
    "parameters": (lambda run: run.parameters, "parameters", ""),
    "bytes": (lambda run: run.bytes, "size of the weights", "B"),
}
# shades of the parts of a model, with a pattern beside the shade
PARTS = (("var(--part-1)", ""), ("var(--part-2)", "/"), ("var(--part-3)", "."), ("var(--part-4)", "x"))


def size_picture(cell: Cell, styles: Styles, size: str) -> Picture | None:
    """Quality against size with the Pareto front; None where nothing is known of the sizes."""
    quantity, title, unit = SIZES[size]
    sized = [(p, f) for p in cell.points if (f := p.figure(quantity)) is not None and f.mean > 0]
    if not sized:
        return None
    front = pareto_front([point for point, _ in sized], quantity)
    trace = go.Scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"color": "var(--ink)", "width": 1, "shape": "hv"},
        hoverinfo="skip",
        name="Pareto front",
    )
    return picture(
        [trace, *_scatter(cell, sized, styles)],
        height=400,
        xaxis=log_axis(title, [f.mean for _, f in sized], unit),
        yaxis=axis(QUALITY_TITLE, tickformat=".3f"),
    )


def latency_picture(cell: Cell, styles: Styles) -> Picture | None:
    """Quality against milliseconds to score a user; None where no run was timed."""
    timed = [(p, f) for p in cell.points if (f := p.figure(lambda run: run.score_ms)) is not None]
    if not timed:
        return None
    times = [f.mean for _, f in timed]
    title = "milliseconds to score the catalogue for one user"
    far = min(times) > 0 and max(times) > 8 * min(times)
    return picture(
        _scatter(cell, timed, styles, spread=not far),
        height=400,
        xaxis=log_axis(title, times) if far else axis(title, nticks=7),
        yaxis=axis(QUALITY_TITLE, tickformat=".3f"),
    )


def _scatter(
    cell: Cell, placed: Sequence[tuple[Point, Figure]], styles: Styles, spread: bool = False
) -> list[go.Scatter]:
    """A trace for each contender; its ratios are joined by a thin line."""
    traces = []
    for name, style in styles.items():
        own = [(p, f) for p, f in placed if p.contender == name]
        if not own:
            continue
        own.sort(key=lambda pair: pair[1].mean)
        sizes = [f for _, f in own]
        trace = go.Scatter(
            x=[f.mean for f in sizes],
            y=[p.quality.mean for p, _ in own],
            error_y=bars([p.quality for p, _ in own], style.colour),
            mode="lines+markers" if len({p.ratio for p, _ in own}) == len(own) > 1 else "markers",
            line={"color": style.colour, "width": 1, "dash": "dot"},
            marker=marker(style),
            hoverinfo="text",
            hovertext=[about(p, cell.reference) for p, _ in own],
            name=safe(name),
            meta=name,
        )
        if spread:
            trace.error_x = bars(sizes, style.colour)
        traces.append(trace)
    return traces


def parts_picture(cell: Cell, ratio: float | None) -> tuple[Picture, list[str]] | None:
    """Parameters by part, a bar for each contender, and the names of the parts."""
    points = [p for p in cell.at(ratio) if any(run.parts for run in p.runs)]
    if not points:
        return None
    points.sort(key=lambda p: p.parameters)
    names = list(dict.fromkeys(n for p in points for run in p.runs for n in run.parts))
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
                hovertext=[f"<b>{l}</b><br>{safe(name)} {s:,.0f}" for l, s in zip(labels, sizes)],
                marker={
                    "color": shade,
                    "pattern": {"shape": pattern, "fgcolor": "var(--paper)", "size": 6},
                    "line": {"width": 0.6, "color": "var(--ink)"},
                },
            )
        )
    totals = [p.parameters for p in points]
    traces.append(_totals(totals, cell.reference))
    drawn = picture(
        traces,
        height=70 + 26 * len(points),
        barmode="stack",
        bargap=0.35,
        xaxis=axis("parameters", range=[0, 1.32 * max(totals)], nticks=5, tickformat="~s"),
        yaxis=axis("", tickvals=list(range(len(points))), ticktext=labels, ticks="", showgrid=False),
    )
    return drawn, names


def _totals(totals: list[float], reference: Point | None) -> go.Scatter:
    """The sum of each bar, written at its end."""
    texts = [f"{total:,.0f}" for total in totals]
    if reference is not None:
        texts = [
            f"{text} (÷ {reference.parameters / total:.1f})"
            if total > 0 and total != reference.parameters
            else text
            for text, total in zip(texts, totals)
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
    """Quality by popularity of the item asked for; the reference as a line across each group."""
    points = [p for p in cell.at(ratio) if any(run.popularity for run in p.runs)]
    if not points:
        return None
    groups = list(dict.fromkeys(g for p in points for run in p.runs for g in run.popularity))
    width = 0.76 / max(len(points), 1)
    traces = [_level(cell.reference, groups)] if cell.reference in points else []
    for i, point in enumerate(points):
        style = styles[point.contender]
        figures = [point.figure(_group(group)) for group in groups]
        traces.append(
            go.Scatter(
                x=[g - 0.38 + (i + 0.5) * width for g in range(len(groups))],
                y=[None if f is None else f.mean for f in figures],
                error_y=bars(figures, style.colour),
                mode="markers",
                marker=marker(style, 9),
                hoverinfo="text",
                hovertext=[
                    f"<b>{safe(point.label)}</b><br>{safe(g)}: {with_spread(f, '.4f')}"
                    for g, f in zip(groups, figures)
                ],
                name=safe(point.label),
                meta=point.contender,
            )
        )
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
        yaxis=axis(QUALITY_TITLE, rangemode="tozero"),
    )


def _group(group: str) -> Quantity:
    return lambda run: run.popularity.get(group)


def _cases(points: Sequence[Point], group: str) -> str:
    cases = [run.cases[group] for p in points for run in p.runs if group in run.cases]
    return f"<br>{max(cases):,.0f} cases" if cases else ""


def _level(reference: Point | None, groups: list[str]) -> go.Scatter:
    x: list[float | None] = []
    y: list[float | None] = []
    for i, group in enumerate(groups):
        figure = reference.figure(_group(group)) if reference else None
        level = None if figure is None else figure.mean
        x += [i - 0.42, i + 0.42, None]
        y += [level, level, None]
    line = {"color": "var(--ink)", "width": 1, "dash": "dot"}
    return go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", name="uncompressed")


def curves_picture(cell: Cell, styles: Styles, ratio: float | None) -> Picture | None:
    """Validation score after each epoch, a line a run, the epoch that was kept marked."""
    traces = [
        _curve(point, run, styles[point.contender])
        for point in cell.at(ratio)
        for run in point.runs
        if run.valid_curve
    ]
    if not traces:
        return None
    return picture(
        traces,
        height=420,
        xaxis=axis("epoch", rangemode="tozero", nticks=8),
        yaxis=axis("NDCG@20, validation", tickformat=".3f"),
    )


def _curve(point: Point, run: StudyRun, style: Style) -> go.Scatter:
    steps = max(1, round((run.epochs or 0) / len(run.valid_curve)))
    epochs = [steps * (i + 1) for i in range(len(run.valid_curve))]
    kept = [epoch == run.best_epoch for epoch in epochs]
    seed = "" if run.seed is None else f", seed {run.seed}"
    return go.Scatter(
        x=epochs,
        y=[None if math.isnan(score) else score for score in run.valid_curve],
        mode="lines+markers",
        line={"color": style.colour, "width": 1.4, "dash": style.dash},
        marker={**marker(style, 9), "opacity": [1 if k else 0 for k in kept]},
        opacity=0.85,
        hoverinfo="text",
        hovertext=[
            f"<b>{safe(point.label)}</b>{seed}<br>epoch {epoch}: {score:.4f}"
            for epoch, score in zip(epochs, run.valid_curve)
        ],
        name=safe(point.label),
        meta=point.contender,
    )
