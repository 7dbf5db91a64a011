"""`write_page`: a study's folder in, `compare.html` out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cprec_recbole.compare.findings import Findings, findings_of
from cprec_recbole.compare.findings.points import Cell, Point, gaps
from cprec_recbole.compare.findings.runs import StudyRun
from cprec_recbole.compare.findings.searches import Searches
from cprec_recbole.compare.findings.standings import standings
from cprec_recbole.compare.page import words
from cprec_recbole.compare.page.breakdowns import PARTS, parts_picture, popularity_picture
from cprec_recbole.compare.page.curves import curves_picture
from cprec_recbole.compare.page.drawing import short, with_spread
from cprec_recbole.compare.page.styles import Styles, assign_styles, outline
from cprec_recbole.compare.page.tradeoffs import SIZES, latency_picture, size_picture
from cprec_recbole.config import CompressionError
from cprec_recbole.files import make_folder, write_whole


def write_page(folder: Path, out: Path, *, against: str | None = None) -> None:
    """Write a study as one self-contained page.

    Args:
        folder: of the study: `runs/*.json`, a run each, and `runs/<key>.npy`, every test user's
            NDCG@20; points without that have no intervals.
        out: the page; what it held stays whole until the new one is.
        against: the contender that the findings are about; None: of ours the one that was run
            most often.

    Raises:
        CompressionError: no run, a run that cannot be read (the file is named), no run of
            `against`, a place that cannot be written.
    """
    page, out = render_page(findings_of(Path(folder), against)), Path(out)
    make_folder(out.parent)
    try:
        write_whole(out, lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise CompressionError(
            f"Expected `out` to be a file that can be written, but got {out}: {error.strerror}."
        ) from None


def render_page(findings: Findings) -> str:
    """The page's HTML."""
    cells, subject = findings.cells, findings.subject
    loader = PackageLoader("cprec_recbole.compare.page", "assets")
    engine = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    engine.policies["json.dumps_kwargs"] = {"sort_keys": False}
    engine.filters.update(spread=with_spread, short=short, median=statistics.median)
    styles = assign_styles(point.contender for cell in cells for point in cell.points)
    environments = _environments(findings.finished)
    over_all = standings(cells, subject)
    own = [standing for standing in over_all if standing.contender == subject]
    return engine.get_template("page.html").render(
        css=_asset("page.css"),
        script=_asset("page.js"),
        plotly=_inline(get_plotlyjs()),
        scope=words.scope(findings),
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
        failed=findings.failed,
        failures=_failures(findings.failed),
        gaps=gaps(cells),
        unmeasured=_unmeasured(findings.finished),
        unequal=Searches(cells).unequal,
    )


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
    """The different machines and versions of runs, in the order of their first one."""
    return list(dict.fromkeys(_in_words(run.environment) for run in runs))


def _in_words(environment: dict[str, Any]) -> str:
    known = [f"{k.replace('_', ' ')} {v}" for k, v in environment.items() if v is not None]
    return ", ".join(known) or "not recorded"


def _failures(failed: Sequence[StudyRun]) -> list[dict[str, str]]:
    """What failed, together where it failed in one cell for one reason."""
    together: dict[tuple[str, str], dict[str, list[str]]] = {}
    for run in failed:
        place = Cell(run.dataset, run.model, run.length).label
        who = Point(run.contender, run.ratio, []).label
        seeds = together.setdefault((place, str(run.error)), {}).setdefault(who, [])
        seeds += [] if run.seed is None else [str(run.seed)]
    return [
        {"place": place, "error": error, "who": ", ".join(map(_with_seeds, who, who.values()))}
        for (place, error), who in together.items()
    ]


def _with_seeds(label: str, seeds: list[str]) -> str:
    if not seeds:
        return label
    return f"{label} (seed{'s' if len(seeds) > 1 else ''} {words.listed(seeds)})"


def _unmeasured(finished: Sequence[StudyRun]) -> list[str]:
    """What runs lack that finished, as sentences."""
    lacks = {
        "each test user's NDCG@20": [run for run in finished if not run.users_path.exists()],
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
