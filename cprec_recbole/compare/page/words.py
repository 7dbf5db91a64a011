"""What a study found, in plain words, all of it computed from its runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from cprec_recbole.compare.page.drawing import short, with_spread
from cprec_recbole.compare.page.points import REFERENCE, Cell, Point
from cprec_recbole.compare.page.runs import StudyRun

SUBJECT = "compressed"
Pair = tuple[Point, Point]  # a point and the uncompressed model of its cell


def scope(runs: Sequence[StudyRun]) -> str:
    """What was compared, counted."""
    finished = [run for run in runs if run.error is None]
    named = finished or runs
    models = sorted({run.model for run in named})
    data = sorted({run.dataset for run in named})
    lengths = sorted({run.length for run in named if run.length is not None})
    seeds = {run.seed for run in named}
    histories = f", histories of {listed([str(n) for n in lengths])} items" if lengths else ""
    searched = sum(len(run.search) for run in finished)
    search = f"; {counted(searched, 'more run')} to find learning rates" if searched else ""
    failed = len(runs) - len(finished)
    return (
        f"{listed(models)} on {listed(data)}{histories}: "
        f"{counted(len({run.contender for run in named}), 'contender')}, "
        f"{counted(len(seeds), 'seed')}, {counted(len(finished), 'finished run')}{search}"
        f"{f'; {failed} failed' if failed else ''}."
    )


def main_finding(cells: Sequence[Cell]) -> str:
    """The one sentence: what the compressed model keeps at the ratio that most cells have."""
    subject = subject_of(cells)
    if not cells:
        return "No run finished, so nothing was found."
    if not any(cell.reference for cell in cells):
        return (
            "No uncompressed model was run, so nothing can be said about what compression costs; "
            "the contenders are compared with each other below."
        )
    if subject is None:
        return "Nothing but the uncompressed model was run so far."
    ratios = ratios_of(cells, subject)
    if not ratios:
        return f"{subject} and the uncompressed model share no model and data set so far."
    ratio = max(ratios, key=lambda r: (len(pairs_at(cells, subject, r)), -(r or 0)))
    return kept(cells, subject, ratio)


def details(cells: Sequence[Cell]) -> list[str]:
    """Further sentences: other ratios, rivals, rare items, latency."""
    subject = subject_of(cells)
    if subject is None or not any(cell.reference for cell in cells):
        return []
    first = main_finding(cells)
    found = []
    for ratio in ratios_of(cells, subject):
        sentence = kept(cells, subject, ratio)
        found += [] if sentence == first else [sentence]
        found += _against_rivals(cells, subject, ratio)
    return [*found, *_rare_items(cells, subject), *_speed(cells, subject)]


def cell_words(cell: Cell) -> str:
    """What was found in one cell: the reference, and the best and the smallest of the others."""
    reference = cell.reference
    others = [point for point in cell.points if point is not reference]
    if reference is None:
        return f"{cell.label}: no uncompressed model was run here."
    start = (
        f"{cell.label}: the uncompressed model has NDCG@20 {with_spread(reference.quality, '.4f')} "
        f"with {reference.parameters:,.0f} parameters."
    )
    smaller = [point for point in others if 0 < point.parameters < reference.parameters]
    if not smaller:
        return f"{start} No contender with fewer parameters was run here."
    best = max(smaller, key=lambda point: point.quality.mean)
    text = (
        f"{start} Of {counted(len(smaller), 'contender')} with fewer, {best.label} has the highest, "
        f"{_result(best, reference)}."
    )
    near = [p for p in smaller if p.quality.mean >= 0.95 * reference.quality.mean]
    if not near:
        return f"{text} None reaches 95% of the uncompressed model's."
    least = min(near, key=lambda point: point.parameters)
    if least is best:
        return f"{text} It is also the smallest that reaches 95% of the uncompressed model's."
    return (
        f"{text} The smallest that reaches 95% of the uncompressed model's is {least.label}, "
        f"{_result(least, reference)}."
    )


def subject_of(cells: Sequence[Cell]) -> str | None:
    """Whom the findings are about: `compressed`, or else the contender that was run most often."""
    names = [p.contender for cell in cells for p in cell.points if p.contender != REFERENCE]
    if SUBJECT in names or not names:
        return SUBJECT if names else None
    return max(dict.fromkeys(names), key=names.count)


def ratios_of(cells: Sequence[Cell], contender: str) -> list[float | None]:
    """Ratios at which a contender stands beside an uncompressed model."""
    ratios = {
        p.ratio for c in cells if c.reference for p in c.points if p.contender == contender
    }
    return sorted(ratios, key=lambda ratio: ratio or 0)


def pairs_at(cells: Sequence[Cell], contender: str, ratio: float | None) -> list[Pair]:
    """A contender's points at a ratio, each with its reference."""
    return [
        (point, cell.reference)
        for cell in cells
        if cell.reference and (point := cell.find(contender, ratio))
    ]


def kept(cells: Sequence[Cell], contender: str, ratio: float | None) -> str:
    """How much of the uncompressed model's quality a contender has at a ratio."""
    pairs = pairs_at(cells, contender, ratio)
    shares = [p.quality.mean / r.quality.mean for p, r in pairs if r.quality.mean > 0]
    smaller = [r.parameters / p.parameters for p, r in pairs if p.parameters > 0]
    name = Point(contender, ratio, []).label
    size = f"with {_range(smaller, '.1f')} times fewer parameters, " if smaller else ""
    if not shares:
        return f"{name}: the uncompressed model's NDCG@20 is zero, so shares of it say nothing."
    if len(shares) == 1:
        text = f"{name}, {size}has {shares[0]:.1%} of the uncompressed model's NDCG@20 on the test set"
        return f"{text}{_certain(pairs)}."
    least, most = min(shares), max(shares)
    at_least = sum(share >= 1 for share in shares)
    return (
        f"{name}, {size}has {median(shares):.1%} of the uncompressed model's NDCG@20 on the test "
        f"set: the median of {len(shares)} comparisons, from {least:.1%} to {most:.1%}. It is not "
        f"below the uncompressed model in {at_least} of {len(shares)}{_certain(pairs)}."
    )


def _certain(pairs: Sequence[Pair]) -> str:
    """What the intervals of the paired differences say, where they are known."""
    intervals = [p.interval for p, _ in pairs if p.interval is not None]
    if not intervals:
        return ""
    fine = sum(high >= 0 for _, _, high in intervals)
    return (
        f"; the interval of the paired difference over users includes or exceeds zero in {fine} of "
        f"{len(intervals)}"
    )


def _against_rivals(cells: Sequence[Cell], subject: str, ratio: float | None) -> list[str]:
    if ratio is None:
        return []
    rivals = list(
        dict.fromkeys(
            p.contender for c in cells for p in c.points if p.ratio == ratio and p.contender != subject
        )
    )
    words = []
    for rival in rivals:
        both = [
            (own.quality.mean, other.quality.mean)
            for cell in cells
            if (own := cell.find(subject, ratio)) and (other := cell.find(rival, ratio))
        ]
        if both:
            words.append(f"{rival} in {sum(a > b for a, b in both)} of {len(both)}")
    if not words:
        return []
    return [f"At ratio {ratio:g}, {subject} has the higher NDCG@20 against {listed(words)}."]


def _rare_items(cells: Sequence[Cell], subject: str) -> list[str]:
    found = []
    for ratio in ratios_of(cells, subject):
        shares: dict[str, list[float]] = {}
        for point, reference in pairs_at(cells, subject, ratio):
            for group in dict.fromkeys(g for run in point.runs for g in run.popularity):
                own = point.figure(lambda run, group=group: run.popularity.get(group))  # type: ignore[misc]
                base = reference.figure(lambda run, group=group: run.popularity.get(group))  # type: ignore[misc]
                if own and base and base.mean > 0:
                    shares.setdefault(group, []).append(own.mean / base.mean)
        words = [f"{median(values):.0%} on {group} items" for group, values in shares.items()]
        if words:
            name = Point(subject, ratio, []).label
            most = max(len(values) for values in shares.values())
            over = "" if most == 1 else " (medians)"
            found.append(
                f"By popularity of the item asked for, {name} has {listed(words)} of the "
                f"uncompressed model's NDCG@20{over}."
            )
    return found


def _speed(cells: Sequence[Cell], subject: str) -> list[str]:
    found = []
    for ratio in ratios_of(cells, subject):
        times = [
            own.mean / base.mean
            for point, reference in pairs_at(cells, subject, ratio)
            if (own := point.figure(lambda run: run.score_ms))
            and (base := reference.figure(lambda run: run.score_ms))
            and base.mean > 0
        ]
        if times:
            words = f"{median(times):.2f} times as long as with the uncompressed model"
            over = "" if len(times) == 1 else f" (median of {len(times)})"
            name = Point(subject, ratio, []).label
            found.append(f"To score one user, {name} takes {words}{over}.")
    return found


def _result(point: Point, reference: Point) -> str:
    share = point.quality.mean / reference.quality.mean if reference.quality.mean > 0 else None
    of = "" if share is None else f" ({share:.1%} of it)"
    times = reference.parameters / point.parameters
    return (
        f"{with_spread(point.quality, '.4f')}{of} with {short(point.parameters)} parameters, "
        f"{times:.1f} times fewer"
    )


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(count: int, noun: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
