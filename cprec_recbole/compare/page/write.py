"""`write_page`: a study's folder in, `compare.html` out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cprec_recbole.compare.page import words
from cprec_recbole.compare.page.breakdowns import PARTS, parts_picture, popularity_picture
from cprec_recbole.compare.page.curves import curves_picture
from cprec_recbole.compare.page.drawing import short, with_spread
from cprec_recbole.compare.page.intervals import PairedInterval, add_intervals
from cprec_recbole.compare.page.points import (
    Cell,
    Point,
    gaps,
    make_cells,
)
from cprec_recbole.compare.page.runs import StudyRun, read_runs, with_comparable_times
from cprec_recbole.compare.page.styles import Styles, assign_styles, outline
from cprec_recbole.compare.page.summary import standings, subject_of
from cprec_recbole.compare.page.tradeoffs import SIZES, latency_picture, size_picture
from cprec_recbole.config import CompressionError
from cprec_recbole.files import make_folder, write_whole


def write_page(
    study_folder: Path,
    out: Path,
    *,
    paired_interval: PairedInterval | None = None,
    against: str | None = None,
) -> None:
    """Write a study as one self-contained page.

    Args:
        study_folder: holds `runs/*.json`, a run each, and may hold `runs/<key>.npy`.
        out: the page; what it held stays whole until the new one is.
        paired_interval: makes the interval of a contender's difference to the uncompressed model
            (`mean`, `low`, `high`) from the values of both for the same users, an array [n_users]
            for each common seed. Without it the page gives no intervals.
        against: the contender that the findings are about; None: of ours the one that was run
            most often.

    Raises:
        CompressionError: no run, a run that cannot be read (the file is named), no run of
            `against`, a place that cannot be written.
    """
    study_folder, out = Path(study_folder), Path(out)
    runs = with_comparable_times(read_runs(study_folder))
    cells = make_cells(runs)
    subject = _subject(cells, against)
    if paired_interval is not None:
        add_intervals(cells, paired_interval, subject)
    page = render_page(runs, cells, subject)
    make_folder(out.parent)
    try:
        write_whole(out, lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise CompressionError(
            f"Expected `out` to be a file that can be written, but got {out}: {error.strerror}."
        ) from None


def render_page(runs: Sequence[StudyRun], cells: Sequence[Cell], subject: str | None) -> str:
    """The page's HTML; the findings are about the subject."""
    loader = PackageLoader("cprec_recbole.compare.page", "assets")
    engine = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    engine.policies["json.dumps_kwargs"] = {"sort_keys": False}
    engine.filters.update(spread=with_spread, short=short, median=statistics.median)
    styles = assign_styles(point.contender for cell in cells for point in cell.points)
    environments = _environments(runs)
    over_all = standings(cells, subject)
    own = [standing for standing in over_all if standing.contender == subject]
    return engine.get_template("page.html").render(
        css=_asset("page.css"),
        script=_asset("page.js"),
        plotly=_inline(get_plotlyjs()),
        scope=words.scope(runs),
        finding=words.main_finding(cells, own),
        details=words.details(own, over_all),
        subject=subject,
        standings=[standing for standing in over_all if standing.shares],
        groups=list(dict.fromkeys(group for standing in over_all for group in standing.groups)),
        legend=[(name, style, outline(style)) for name, style in styles.items()],
        cells=cells,
        study=[_cell_data(cell, styles) for cell in cells],
        rows=[_row(i, cell, point) for i, cell in enumerate(cells) for point in cell.points],
        with_intervals=any(point.interval for cell in cells for point in cell.points),
        environments=environments,
        environment_of=lambda run: environments.index(_in_words(run.environment)) + 1,
        failed=[run for run in runs if run.error is not None],
        failures=_failures(runs),
        gaps=gaps(cells),
        unmeasured=_unmeasured(runs),
    )


def _subject(cells: Sequence[Cell], against: str | None) -> str | None:
    points = {(i, p.contender, p.ratio) for i, cell in enumerate(cells) for p in cell.points}
    return subject_of((contender for _, contender, _ in points), against)


def _cell_data(cell: Cell, styles: Styles) -> dict[str, Any]:
    """What the page's script needs of a cell: its place in the pickers, its words and pictures."""
    ratios: list[float | None] = [*cell.ratios] or [None]
    parts = {_name(ratio): parts_picture(cell, ratio) for ratio in ratios}
    return {
        "dataset": cell.dataset,
        "model": cell.model,
        "length": "" if cell.length is None else str(cell.length),
        "ratios": [_name(ratio) for ratio in ratios],
        "contenders": list(dict.fromkeys(point.contender for point in cell.points)),
        "words": words.cell_words(cell),
        "pictures": {
            "size": {name: size_picture(cell, styles, name) for name in SIZES},
            "latency": latency_picture(cell, styles),
            "parts": {name: found and found[0] for name, found in parts.items()},
            "popularity": {_name(r): popularity_picture(cell, styles, r) for r in ratios},
            "curves": {_name(r): curves_picture(cell, styles, r) for r in ratios},
        },
        "parts": {
            name: [[part, i % len(PARTS)] for i, part in enumerate(found[1] if found else [])]
            for name, found in parts.items()
        },
    }


def _name(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:g}"


def _row(index: int, cell: Cell, point: Point) -> dict[str, Any]:
    """A line of the table: the figures that its columns write and sort by."""

    def metric(name: str) -> Any:
        return point.figure(lambda run: run.test.get(name))

    return {
        "cell": index,
        "place": cell,
        "point": point,
        "ndcg": point.quality,
        "hit": metric("hit@20"),
        "mrr": metric("mrr@20"),
        "smaller": cell.reference.size / point.size if cell.reference and point.size > 0 else None,
        "bytes": point.figure(lambda run: run.bytes),
        "score_ms": point.figure(lambda run: run.score_ms),
        "epoch": point.figure(_epoch_seconds),
        "best_epoch": point.figure(lambda run: run.best_epoch),
    }


def _epoch_seconds(run: StudyRun) -> float | None:
    return statistics.median(run.epoch_seconds) if run.epoch_seconds else None


def _environments(runs: Sequence[StudyRun]) -> list[str]:
    """The different machines and versions of a study, in the order of their first run."""
    finished = [run for run in runs if run.error is None]
    return list(dict.fromkeys(_in_words(run.environment) for run in finished))


def _in_words(environment: dict[str, Any]) -> str:
    known = [f"{k.replace('_', ' ')} {v}" for k, v in environment.items() if v is not None]
    return ", ".join(known) or "not recorded"


def _failures(runs: Sequence[StudyRun]) -> list[dict[str, str]]:
    """What failed, together where it failed in one cell for one reason."""
    together: dict[tuple[str, str], dict[str, list[str]]] = {}
    for run in runs:
        if run.error is not None:
            place = Cell(run.dataset, run.model, run.length).label
            who = Point(run.contender, run.ratio, []).label
            seeds = together.setdefault((place, run.error), {}).setdefault(who, [])
            seeds += [] if run.seed is None else [str(run.seed)]
    return [
        {"place": place, "error": error, "who": ", ".join(map(_with_seeds, who, who.values()))}
        for (place, error), who in together.items()
    ]


def _with_seeds(label: str, seeds: list[str]) -> str:
    if not seeds:
        return label
    return f"{label} (seed{'s' if len(seeds) > 1 else ''} {words.listed(seeds)})"


def _unmeasured(runs: Sequence[StudyRun]) -> list[str]:
    """What runs lack that finished, as sentences."""
    finished = [run for run in runs if run.error is None]
    lacks = {
        "quality by popularity": [run for run in finished if not run.popularity],
        "latency": [run for run in finished if run.score_ms is None and not run.is_elsewhere],
        "times on the machine of the uncompressed model": [r for r in finished if r.is_elsewhere],
        "bytes": [run for run in finished if run.bytes is None],
        "training curve": [run for run in finished if not run.valid_curve],
        "parameters by part": [run for run in finished if not run.parts],
        "command": [run for run in finished if not run.command],
    }
    return [
        f"{what}: {len(lacking)} of {words.counted(len(finished), 'finished run')} "
        f"({words.listed(sorted({run.contender for run in lacking}))})."
        for what, lacking in lacks.items()
        if lacking
    ]


def _asset(name: str) -> Markup:
    return _inline((Path(__file__).parent / "assets" / name).read_text(encoding="utf-8"))


def _inline(code: str) -> Markup:
    """Our own and plotly's code as it stands, unless it held the end of its own element."""
    return Markup(code.replace("</script", "<\\/script"))
