"""Training curves: the validation score after each epoch."""

from __future__ import annotations

import math
from statistics import mean

import plotly.graph_objects as go

from cprec_recbole.compare.findings.points import Cell, Point
from cprec_recbole.compare.findings.runs import StudyRun
from cprec_recbole.compare.page.drawing import Picture, axis, marker, picture, safe, span
from cprec_recbole.compare.page.styles import Style, Styles
from cprec_recbole.compare.results import Figure


def curves_picture(cell: Cell, styles: Styles, ratio: float | None) -> Picture | None:
    """Validation score after each epoch: a thin line a run, a thick one for their mean."""
    points = [p for p in cell.at(ratio) if any(run.valid_curve for run in p.runs)]
    if not points:
        return None
    thin = [
        _run_curve(point, run, styles[point.contender])
        for point in points
        for run in point.runs
        if run.valid_curve and len(point.runs) > 1
    ]
    scores = [Figure(s, math.nan) for p in points for run in p.runs for s in run.valid_curve]
    longest = max(_epochs(run)[-1] for p in points for run in p.runs if run.valid_curve)
    return picture(
        [*thin, *(_mean_curve(point, styles[point.contender]) for point in points)],
        height=440,
        xaxis=axis(
            "epoch", rangemode="tozero", **({"dtick": 1} if longest <= 8 else {"nticks": 8})
        ),
        yaxis=axis(f"{_metric(points)}, validation", range=span(scores)),
    )


def _run_curve(point: Point, run: StudyRun, style: Style) -> go.Scatter:
    return go.Scatter(
        x=_epochs(run),
        y=[None if math.isnan(score) else score for score in run.valid_curve],
        mode="lines",
        line={"color": style.colour, "width": 0.8, "dash": style.dash},
        opacity=0.35,
        hoverinfo="skip",
        name=f"{safe(point.label)}, seed {run.seed}",
        meta=point.contender,
    )


def _mean_curve(point: Point, style: Style) -> go.Scatter:
    """The mean over the seeds, as far as the shortest run goes."""
    runs = [run for run in point.runs if run.valid_curve]
    shortest = min(runs, key=lambda run: len(run.valid_curve))
    epochs = _epochs(shortest)
    scores = [mean(at) for at in zip(*(run.valid_curve for run in runs))]
    kept = [f"{run.best_epoch:g}" for run in runs if run.best_epoch is not None]
    best = f"<br>kept: epoch {', '.join(kept)}" if kept else ""
    return go.Scatter(
        x=epochs,
        y=[None if math.isnan(score) else score for score in scores],
        mode="lines+markers",
        line={"color": style.colour, "width": 1.8, "dash": style.dash},
        marker={**marker(style, 8), "maxdisplayed": 6},
        hoverinfo="text",
        hovertext=[
            f"<b>{safe(point.label)}</b><br>epoch {epoch}: {score:.4f}{best}"
            for epoch, score in zip(epochs, scores)
        ],
        name=safe(point.label),
        meta=point.contender,
    )


def _metric(points: list[Point]) -> str:
    """What the curves are of; runs of before did not say."""
    known = {run.curve_metric for p in points for run in p.runs if run.valid_curve}
    names = {name.upper() for name in known if name} or {"NDCG@20"}
    return " and ".join(sorted(names))


def _epochs(run: StudyRun) -> list[int]:
    """The epochs after which a run was evaluated."""
    step = run.eval_step or max(1, round((run.epochs or 0) / len(run.valid_curve)))
    return [step * (i + 1) for i in range(len(run.valid_curve))]
