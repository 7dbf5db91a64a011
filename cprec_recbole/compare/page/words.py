"""What a study found, in plain words, all of it computed from its runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from cprec_recbole.compare.findings.found import Findings
from cprec_recbole.compare.findings.points import Cell, Point
from cprec_recbole.compare.findings.searches import Searches
from cprec_recbole.compare.findings.standings import Standing, share_of
from cprec_recbole.compare.page.drawing import short, with_spread
from cprec_recbole.compare.results import QUALITY


def scope(findings: Findings) -> str:
    """What was compared, counted."""
    finished, failed = findings.finished, len(findings.failed)
    named = finished or findings.runs
    models = sorted({run.model for run in named})
    data = sorted({run.dataset for run in named})
    lengths = sorted({run.length for run in named if run.length is not None})
    seeds = {run.seed for run in named}
    histories = f", histories of {listed([str(n) for n in lengths])} items" if lengths else ""
    searches, search = Searches(findings.cells), ""
    if several := searches.several:
        tried = counted(sum(len(point.search) for point in several), "training")
        highest, _, ended = searches.edges
        search = f", learning rates searched in {tried} (the highest won {highest} of {ended})"
    return (
        f"{listed(models)} on {listed(data)}{histories}: "
        f"{counted(len({run.contender for run in named}), 'contender')}, "
        f"{counted(len(seeds), 'seed')}, {counted(len(finished), 'finished run')}{search}"
        f"{f', {failed} failed' if failed else ''}."
    )


def main_finding(cells: Sequence[Cell], own: Sequence[Standing]) -> str:
    """The one sentence: what the subject keeps at the ratio that most cells have.

    Args:
        cells: all cells.
        own: where the subject stands, at each of its ratios.
    """
    if not cells:
        return "No run finished, so nothing was found."
    if not any(cell.reference for cell in cells):
        return (
            "No uncompressed model was run, so nothing can be said about what compression costs; "
            "the contenders are compared with each other below."
        )
    if not own:
        return "Nothing but the uncompressed model was run so far."
    if not any(standing.smaller for standing in own):
        return (
            f"{own[0].contender} and the uncompressed model have no model and data set in common "
            "so far."
        )
    return kept(_first(own))


def details(own: Sequence[Standing], others: Sequence[Standing]) -> list[str]:
    """Further sentences: other ratios, rivals, rare items, latency."""
    shown = [standing for standing in own if standing.smaller]
    if not shown:
        return []
    first = _first(shown)
    rest = [kept(standing) for standing in shown if standing is not first]
    return [*rest, *_rivals(shown[0], others), *_rare_items(shown), *_speed(shown)]


def _first(own: Sequence[Standing]) -> Standing:
    return max(own, key=lambda s: (len(s.smaller), -(s.ratio or 0)))


def kept(standing: Standing) -> str:
    """How much of the uncompressed model's quality a contender has at a ratio."""
    shares, name = standing.shares, standing.contender
    size = f"{_range(standing.smaller, '.1f')} times smaller"
    start = (
        f"{_at(standing).capitalize()}, {size}, {name}" if standing.ratio else f"{name}, {size},"
    )
    if not shares:
        return f"{start} cannot be judged: the uncompressed model's NDCG@20 is zero."
    share = _percent(median(shares))
    text = f"{start} has {share} of the uncompressed model's NDCG@20 on the test set"
    if len(shares) > 1:
        text += (
            f": the median of {len(shares)} comparisons, from {_percent(min(shares))} to "
            f"{_percent(max(shares))}. It is not below the uncompressed model in "
            f"{standing.not_below} of {len(shares)}"
        )
    if standing.intervals:
        text += (
            "; the interval of the paired difference over users includes or exceeds zero in "
            f"{standing.certain} of {len(standing.intervals)}"
        )
    return f"{text}."


def _rivals(subject: Standing, others: Sequence[Standing]) -> list[str]:
    """How often the subject is above each other contender at equal ratio, and how often more than
    another sample of users would change."""
    fought = [standing for standing in others if standing.lost[1]]
    names = list(dict.fromkeys(standing.contender for standing in fought))
    parts = [_rival([s for s in fought if s.contender == name]) for name in names]
    if not parts:
        return []
    start = "" if subject.ratio is None else "At equal ratio, "
    return [f"{start}{subject.contender} has the higher NDCG@20 against {listed(parts)}."]


def _rival(standings: Sequence[Standing]) -> str:
    """One contender at all ratios: `narrower in 8 of 9 (5 beyond chance)`."""
    won, fought = (sum(s.lost[i] for s in standings) for i in (0, 1))
    text = f"{standings[0].contender} in {won} of {fought}"
    tested = sum(s.tested for s in standings)
    if not tested:
        return text
    of = "" if tested == fought else f" of {tested}"
    below = sum(s.surely_won for s in standings)
    contrary = f", {below} below it beyond chance" if below else ""
    return f"{text} ({sum(s.surely_lost for s in standings)}{of} beyond chance{contrary})"


def _rare_items(own: Sequence[Standing]) -> list[str]:
    words = []
    for standing in own:
        medians = [f"{_share(value)} on {name}" for name, value in standing.group_medians.items()]
        if medians:
            words.append(f"{_at(standing)} {listed(medians)} items".strip())
    if not words:
        return []
    over = " (medians)" if any(len(v) > 1 for s in own for v in s.groups.values()) else ""
    return [
        f"By popularity of the item asked for, {own[0].contender} has these shares of the "
        f"uncompressed model's NDCG@20{over}: {'; '.join(words)}."
    ]


def _speed(own: Sequence[Standing]) -> list[str]:
    times = [f"{median(s.slower):.2f} times as long {_at(s)}".strip() for s in own if s.slower]
    if not times:
        return []
    over = " (medians)" if any(len(s.slower) > 1 for s in own) else ""
    name = own[0].contender
    return [f"To score one user {name} takes {listed(times)}{over}."]


def _at(standing: Standing) -> str:
    return "" if standing.ratio is None else f"at ratio {standing.ratio:g}"


def cell_words(cell: Cell) -> str:
    """What was found in one cell: the reference, and the best and the smallest of the others."""
    reference = cell.reference
    if reference is None:
        return f"{cell.label}: no uncompressed model was run here."
    start = (
        f"{cell.label}: the uncompressed model has NDCG@20 {with_spread(reference.quality, '.4f')} "
        f"with {reference.parameters:,.0f} parameters."
    )
    smaller = [point for point in cell.points if 0 < point.size < reference.size]
    if not smaller:
        return f"{start} No smaller contender was run here."
    best = max(smaller, key=lambda point: _kept(point, reference) or 0.0)
    many = "one smaller point" if len(smaller) == 1 else f"best of {len(smaller)} smaller points"
    text = f"{start} The {many} is {best.label}: {_result(best, reference)}."
    if len(smaller) == 1:
        return text
    near = [p for p in smaller if (_kept(p, reference) or 0.0) >= 0.95]
    if not near:
        return f"{text} None reaches 95% of the uncompressed model's."
    least = min(near, key=lambda point: point.size)
    if least is best:
        return f"{text} None smaller than that one reaches 95%."
    return f"{text} The smallest that reaches 95% is {least.label}: {_result(least, reference)}."


def _result(point: Point, reference: Point) -> str:
    share = _kept(point, reference)
    of = "" if share is None else f", {_percent(share)} of it,"
    times = reference.size / point.size
    return (
        f"{with_spread(point.quality, '.4f')}{of} in {short(point.size, 'B')}, {times:.1f} times "
        "smaller"
    )


def _kept(point: Point, reference: Point) -> float | None:
    return share_of(point, reference, lambda run: run.test[QUALITY])


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _share(share: float) -> str:
    return f"{share:.0%}" if share <= 3 else "more than 300%"


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(count: int, noun: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
