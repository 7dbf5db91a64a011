"""Ranks, cutoffs and sharing for a budget: a number of times smaller, or a size in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from cprec_recbole.compression.original import Original
from cprec_recbole.compression.spectra import PARAMETERS, Cost, Spectra, Unit, block_ends
from cprec_recbole.config import (
    SHARING_SCHEMES,
    BlockPlan,
    CompressionConfig,
    CompressionError,
    is_number,
)
from cprec_recbole.outcome import Choice
from cprec_recbole.report import describe_sharing, layer_parameters
from cprec_recbole.sharing import sharing_plan, sharing_sets
from cprec_recbole.units import n_bytes

# Items are weighted by these powers of their counts. By the counts themselves the tail would get
# rank 1, from which training cannot bring it back; flatter ranks lose more at once and come back
# further. SASRec on amazon-beauty in int8 at ratio 8, validation / test at once with a quarter, a
# third and a half: 81 / 76%, 84 / 78% and 88 / 80%, of which a third comes back to 98.5 / 98.6%;
# before directions counted a quarter came back to 99.0 / 98.0%, a half to 97.0 / 96.7%.
_TRAINED_POWER = 1 / 3
# From scratch there at ratio 4 (25 epochs, rate 3e-3) blocks by the counts themselves reached .0602
# / .0473, one rank for all .0601 / .0496. On lastfm at ratio 3.5 a quarter makes one block for
# SASRec and two for NextItNet, .0221 on test, where one rank for all reached .0281 (1,090 users).
_FRESH_POWER = 1 / 4
# What sharing is taken to cost a model that is trained afterwards, when all layers become one set:
# as much as losing a twentieth of the table. On MovieLens-100K it cost nothing (docs/method.md).
_FRESH_SHARING = 0.05


@dataclass(frozen=True)
class _Candidate:
    options: CompressionConfig
    sharing: str  # in words
    table: float  # share of the table that is lost
    hidden: float  # relative error of the hidden states

    @property
    def total(self) -> float:
        return self.table + self.hidden


def checked_ratio(ratio: object, option: str = "ratio") -> float:
    """A ratio of parameters as a number; else a CompressionError that names the option."""
    if not is_number(ratio) or not 1 <= ratio < math.inf:
        raise CompressionError(
            f"Expected `{option}` to be a number of times, 1 or more, but got {ratio!r}."
        )
    return float(ratio)


def checked_bytes(size: object) -> int:
    """A size such as `"2MB"`, `"512 KiB"` or a number of bytes; else a CompressionError."""
    found = n_bytes(size)
    if found is None:
        raise CompressionError(
            'Expected `size` to be a number of bytes, or text such as "2MB" or "512KiB", but got '
            f"{size!r}."
        )
    return found


def smallest_possible(
    original: Original, base: CompressionConfig, sharing: str | None, unit: Unit = PARAMETERS
) -> int:
    """What the smallest model costs: one block of rank 1, as much shared as may be."""
    schemes = (sharing,) if sharing else SHARING_SCHEMES
    table = _cost(original, base, unit).of(_rank_one(original))
    return table + min(_layers(original, scheme, unit) for scheme in schemes)


def choose(
    original: Original,
    counts: np.ndarray,
    limit: int,
    base: CompressionConfig,
    sharing: str | None,
    hidden_error: Callable[[CompressionConfig], float],
    trained: bool,
    unit: Unit = PARAMETERS,
    importance: Tensor | None = None,
    n_bytes: int | None = None,
) -> Choice:
    """The options that lose least within a number of parameters, or of bytes.

    For each way of sharing layers that leaves room for a table, the best table is found; then what
    the table loses is added to what the hidden states lose, both as relative squared errors, and
    the least sum wins.

    Args:
        original: what is compressed.
        counts: training interactions of each item id, `[n_items]`.
        limit: what the model may cost.
        base: the other options, without ranks and cutoffs.
        sharing: the scheme, or None to choose one.
        hidden_error: relative error of the hidden states under given options; asked of a trained
            original only.
        trained: whether the original is; of a fresh one only the counts say anything.
        unit: what `limit` is counted in.
        importance: of the directions of a trained table, `[d, d]`; None: all are equal.
        n_bytes: what was asked for where that was a size, for the message.

    Raises:
        CompressionError: the budget is below the smallest possible model.
    """
    smallest = smallest_possible(original, base, sharing, unit)
    if limit < smallest:
        whole = unit.other * sum(p.numel() for p in original.model.parameters())
        least, got = f"a budget of {smallest:,} {unit.name}", f"{limit:,}"
        if n_bytes is not None:
            size = smallest * original.dtype.itemsize // unit.other
            least, got = f"`size` to be {size:,} bytes", f"{n_bytes:,}"
        raise CompressionError(
            f"Expected {least} or more (ratio {math.floor(100 * whole / smallest) / 100:.2f} at "
            f"most), which is the smallest possible model, but got {got}: "
            f"{_why_no_smaller(original, base, sharing, unit)}."
        )
    ends = block_ends(original.n_items)
    if trained:
        spectra = Spectra.of_table(original.table, counts**_TRAINED_POWER, ends, importance)
    else:
        spectra = Spectra.of_counts(counts**_FRESH_POWER, original.dim, ends)
    cost = _cost(original, base, unit)
    found: list[_Candidate] = []
    crowded: list[str] = []
    for scheme, in_words, freedom in _schemes(original, sharing):
        layers = _layers(original, scheme, unit)
        plan = spectra.best_plan(limit - layers, cost)
        if plan is None:
            crowded.append(f"{in_words} leaves no room for a table ({layers:,} in the layers)")
            continue
        options = replace(base, sharing=scheme, ranks=plan.ranks, cutoffs=plan.cutoffs)
        hidden = hidden_error(options) if trained else _FRESH_SHARING * (1 - freedom)
        found.append(_Candidate(options, in_words, spectra.loss(plan), hidden))
    best = min(found, key=lambda candidate: candidate.total)
    plan = best.options.plan(original.dim, original.n_items)
    total = cost.of(plan) + _layers(original, best.options.sharing, unit)
    reasons = _reasons(best, [c for c in found if c is not best], crowded, trained)
    return Choice(best.options, total, limit, reasons, unit.name)


def _reasons(
    best: _Candidate, others: list[_Candidate], crowded: list[str], trained: bool
) -> tuple[str, ...]:
    options = best.options
    blocks = zip(options.ranks or (), (0, *(options.cutoffs or ())), options.cutoffs or ())
    table = ", ".join(f"rank {rank} for {end - start:,.0f}" for rank, start, end in blocks)
    basis = (
        "by the spectra of the trained table, items weighted by the cube root of their counts "
        f"and directions by how they are scored, it loses {best.table:.1%}"
        if trained
        else f"untrained: by the fourth root of the counts, an expected loss of {best.table:.1%}"
    )
    error = "error of the hidden states" if trained else "taken to cost"
    reasons = [f"items from head to tail: {table}; {basis}"]
    reasons.append(f"sharing {best.sharing}: {error} {best.hidden:.1%}")
    reasons += [
        f"not {other.sharing}: table {other.table:.1%} and {error} {other.hidden:.1%}"
        for other in others
    ]
    reasons += [f"not possible: {reason}" for reason in crowded]
    return tuple(reasons)


def _schemes(original: Original, sharing: str | None) -> list[tuple[str, str, float]]:
    """Schemes that differ on this model: name, in words, and the share of free sets left."""
    layers = original.record.layers(original.host)
    seen: dict[tuple[tuple[int, ...], ...], tuple[str, str, float]] = {}
    for scheme in (sharing,) if sharing else SHARING_SCHEMES:
        sets = sharing_sets(layers, sharing_plan(scheme, len(layers), original.record.group))
        freedom = (len(sets) - 1) / (len(layers) - 1) if len(layers) > 1 else 1.0
        entry = (scheme, describe_sharing(scheme, len(layers), len(sets)), freedom)
        seen.setdefault(tuple(tuple(members) for members in sets), entry)
    return list(seen.values())


def _rank_one(original: Original) -> BlockPlan:
    return BlockPlan((1,), (original.n_items,), original.dim)


def _layers(original: Original, scheme: str, unit: Unit) -> int:
    """What everything but the table and the softmax costs."""
    left = layer_parameters(original.record, original.host, scheme)
    return sum(unit.parameter(p) for p in left)


def _cost(original: Original, base: CompressionConfig, unit: Unit) -> Cost:
    cluster = original.dim if base.softmax == "tree" else 0
    return Cost(copies=1 if base.tied else 2, cluster=cluster, unit=unit)


def _why_no_smaller(
    original: Original, base: CompressionConfig, sharing: str | None, unit: Unit
) -> str:
    smallest = smallest_possible(original, base, sharing, unit)
    table = _cost(original, base, unit).of(_rank_one(original))
    return (
        f"{smallest - table:,} are in the layers, shared as far as they can be, {table:,} in a "
        "table of rank 1"
    )
