"""Quality against what it costs: size with the Pareto front, and latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from cprec_recbole.compare.findings.points import Cell, Point, Quantity, pareto_front
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
    span,
)
from cprec_recbole.compare.page.styles import Styles
from cprec_recbole.compare.results import Figure

# what the size axis shows, by the names of the page's picker
SIZES: dict[str, tuple[Quantity, str, str]] = {
    "bytes": (lambda run: run.bytes, "size of the weights", "B"),
    "parameters": (lambda run: run.parameters, "parameters", ""),
}


def size_picture(cell: Cell, styles: Styles, size: str) -> Picture | None:
    """Quality against size with the Pareto front; None where nothing is known of the sizes."""
    quantity, title, unit = SIZES[size]
    sized = [(p, f) for p in cell.points if (f := p.figure(quantity)) is not None and f.mean > 0]
    if not sized:
        return None
    sizes = [f.mean for _, f in sized]
    return picture(
        [
            _front([p for p, _ in sized], quantity, 1.25 * max(sizes)),
            *_scatter(cell, sized, styles),
        ],
        height=400,
        xaxis=log_axis(title, sizes, unit),
        yaxis=_quality_axis([p for p, _ in sized]),
    )


def _front(points: Sequence[Point], quantity: Quantity, end: float) -> go.Scatter:
    """The Pareto front as steps that go on to the right end of the picture."""
    front = pareto_front(points, quantity)
    front.append((end, front[-1][1]))
    return go.Scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"color": "var(--grey)", "width": 1.5, "shape": "hv"},
        hoverinfo="skip",
        name="Pareto front",
    )


def latency_picture(cell: Cell, styles: Styles) -> Picture | None:
    """Quality against milliseconds to score a user; None where no run was timed."""
    timed = [(p, f) for p in cell.points if (f := p.figure(lambda run: run.score_ms)) is not None]
    if not timed:
        return None
    times = [f.mean for _, f in timed]
    title = "milliseconds to score one user"
    far = min(times) > 0 and max(times) > 8 * min(times)
    return picture(
        _scatter(cell, timed, styles),
        height=400,
        xaxis=log_axis(title, times) if far else _linear_axis(title, max(times)),
        yaxis=_quality_axis([p for p, _ in timed]),
    )


def _linear_axis(title: str, longest: float) -> dict[str, Any]:
    """From zero on, so that times that hardly differ look so."""
    return axis(title, nticks=7, range=[0, 1.08 * longest or 1.0])


def _quality_axis(points: Sequence[Point]) -> dict[str, Any]:
    return axis(QUALITY_TITLE, range=span(p.quality for p in points))


def _scatter(
    cell: Cell, placed: Sequence[tuple[Point, Figure]], styles: Styles
) -> list[go.Scatter]:
    """A trace for each contender; its ratios are joined by a thin line."""
    traces = []
    for name, style in styles.items():
        own = [(p, f) for p, f in placed if p.contender == name]
        if not own:
            continue
        own.sort(key=lambda pair: pair[1].mean)
        traces.append(
            go.Scatter(
                x=[f.mean for _, f in own],
                y=[p.quality.mean for p, _ in own],
                error_y=bars([p.quality for p, _ in own], style.colour),
                mode="lines+markers"
                if len({p.ratio for p, _ in own}) == len(own) > 1
                else "markers",
                line={"color": style.colour, "width": 1, "dash": "dot"},
                marker=marker(style),
                hoverinfo="text",
                hovertext=[about(p, cell.reference) for p, _ in own],
                name=safe(name),
                meta=name,
            )
        )
    return traces
