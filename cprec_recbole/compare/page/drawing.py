"""What all pictures have in common: layout, axes, markers, texts.

Colours of paper, ink and lines are CSS variables that the page fills in, light or dark.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from cprec_recbole.compare.findings.points import Point
from cprec_recbole.compare.page.styles import Style
from cprec_recbole.compare.results import Figure

Picture = dict[str, Any]  # plotly's data and layout, as JSON has them

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
CLEAR = "rgba(0,0,0,0)"
QUALITY_TITLE = "NDCG@20, test"


def picture(traces: Sequence[Any], *, height: int, **layout: Any) -> Picture:
    """A picture without legend, title or background, at the height that is given in pixels."""
    base: dict[str, Any] = {
        "template": go.layout.Template(),
        "height": height,
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": FONT, "size": 13, "color": "var(--ink)"},
        "margin": {"l": 8, "r": 14, "t": 10, "b": 8},
        "showlegend": False,
        "dragmode": False,  # a finger scrolls the page
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "var(--paper)", "font": {"color": "var(--ink)"}, "align": "left"},
    }
    drawn: Picture = json.loads(go.Figure(list(traces), {**base, **layout}).to_json())
    return drawn


def axis(title: str, **more: Any) -> dict[str, Any]:
    """A thin axis with a light grid."""
    return {
        "title": {"text": title, "standoff": 10},
        "showline": True,
        "linecolor": "var(--grey)",
        "gridcolor": "var(--line)",
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "var(--grey)",
        "automargin": True,
        "fixedrange": True,
        **more,
    }


def log_axis(title: str, values: Sequence[float], unit: str = "") -> dict[str, Any]:
    """A logarithmic axis around the values, with round figures as ticks."""
    low, high = min(values) / 1.25, max(values) * 1.25
    ticks = round_figures(low, high)
    return axis(
        title,
        type="log",
        range=[math.log10(low), math.log10(high)],
        tickvals=ticks,
        ticktext=[short(tick, unit) for tick in ticks],
        tickangle=0,
    )


def span(figures: Iterable[Figure | None]) -> list[float]:
    """From the lowest to the highest end of the error bars, with room around; never empty."""
    ends = [
        f.mean + sign * (0 if math.isnan(f.spread) else f.spread)
        for f in figures
        if f is not None and math.isfinite(f.mean)
        for sign in (-1, 1)
    ]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]


def round_figures(low: float, high: float) -> list[float]:
    """Round figures from low to high, at most five where that can be, at about equal ratios."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
        (1, 1.5, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) <= 5:
            break
    return ticks


def marker(style: Style, size: float = 10) -> dict[str, Any]:
    """The symbol of a contender; open ones have a thicker line."""
    width = 2 if style.symbol.endswith("-open") else 0.6
    line = style.colour if width == 2 else "var(--ink)"
    larger = {"star": 1.35, "x": 0.95, "hourglass": 0.95}.get(style.symbol, 1.0)
    return {
        "symbol": style.symbol,
        "size": round(size * larger, 1),
        "color": style.colour,
        "line": {"width": width, "color": line},
    }


def bars(figures: Sequence[Figure | None], colour: str) -> dict[str, Any]:
    """Error bars of the spread over seeds, where there is more than one."""
    spreads = [0 if f is None or math.isnan(f.spread) else f.spread for f in figures]
    return {
        "type": "data",
        "array": spreads,
        "visible": any(spreads),
        "color": colour,
        "thickness": 1.2,
        "width": 3,
    }


def safe(text: str) -> str:
    """A text as plotly shows it letter by letter: plotly reads tags and entities."""
    return html.escape(text, quote=False)


def with_spread(figure: Figure | None, form: str) -> str:
    """`mean ± spread`, the mean alone for one seed, a dash where nothing was measured."""
    if figure is None:
        return "–"
    if math.isnan(figure.spread):
        return format(figure.mean, form)
    return f"{figure.mean:{form}}\u00a0±\u00a0{figure.spread:{form}}"  # not to be broken


def about(point: Point, reference: Point | None) -> str:
    """What shows when a point is touched."""
    seeds = "1 seed" if len(point.runs) == 1 else f"{len(point.runs)} seeds"
    smaller = ""
    if reference is not None and point is not reference and point.size > 0:
        smaller = f" (÷ {reference.size / point.size:.1f})"
    lines = [
        f"<b>{safe(point.label)}</b>",
        f"NDCG@20 {with_spread(point.quality, '.4f')}, {seeds}",
        f"{point.parameters:,.0f} parameters",
        f"{short(point.size, 'B')}{smaller}",
    ]
    if (time := point.figure(lambda run: run.score_ms)) is not None:
        lines.append(f"{time.mean:.2f} ms a user")
    return "<br>".join(lines)


def short(value: float, unit: str = "") -> str:
    """A figure with k, M or G: `66k`, `1.5 MB`."""
    gap = " " if unit else ""
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{gap}{prefix}{unit}"
    return f"{value:.3g}{gap}{unit}"
