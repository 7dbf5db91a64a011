"""Ranks, cutoffs and sharing for a budget: a number of times smaller, or a size in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from cprec_recbole.compression.original import Original
from cprec_recbole.compression.spectra import Spectra, block_ends
from cprec_recbole.config import (
    SHARING_SCHEMES,
    BlockPlan,
    CompressionConfig,
    CompressionError,
    is_number,
    size_in_bytes,
)
from cprec_recbole.costs import PARAMETERS, TableCost, Unit, describe_sharing, layer_parameters
from cprec_recbole.results import ChosenOptions

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


def checked_ratio(ratio: object, option: str = "ratio") -> float:
    """A ratio of parameters as a number; else a CompressionError that names the option."""
    if not is_number(ratio) or not 1 <= ratio < math.inf:
        raise CompressionError(
            f"Expected `{option}` to be a number of times, 1 or more, but got {ratio!r}."
        )
    return float(ratio)


def checked_bytes(size: object) -> int:
    """A size such as `"2MB"`, `"512 KiB"` or a number of bytes; else a CompressionError."""
    found = size_in_bytes(size)
    if found is None:
        raise CompressionError(
            'Expected `size` to be a number of bytes, or text such as "2MB" or "512KiB", but got '
            f"{size!r}."
        )
    return found


@dataclass(frozen=True)
class Budget:
    """The most that a compressed model of an original may cost.

    Attributes:
        limit: the most, in `unit`.
        whole: what the original costs, in `unit`.
        unit: parameters; bytes where matrices are kept in int8.
        bytes_per_parameter: of the original.
        size: the bytes that were asked for; None for a ratio.
    """

    limit: int
    whole: int
    unit: Unit
    bytes_per_parameter: int
    size: int | None = None

    @classmethod
    def of_ratio(cls, ratio: float, original: Original, unit: Unit) -> Budget:
        """A model that costs at least `ratio` times less than the original."""
        whole = unit.other * original.n_parameters
        return cls(int(whole / ratio), whole, unit, original.dtype.itemsize)

    @classmethod
    def of_size(cls, size: int, original: Original, unit: Unit) -> Budget:
        """A model whose weights take at most `size` bytes."""
        whole, itemsize = unit.other * original.n_parameters, original.dtype.itemsize
        return cls(size * unit.other // itemsize, whole, unit, itemsize, size)

    def check(self, smallest: int, reason: str) -> None:
        """Raise a CompressionError where the smallest possible model costs more."""
        if self.limit >= smallest:
            return
        least, got = f"a budget of {smallest:,} {self.unit.name}", f"{self.limit:,}"
        if self.size is not None:
            n_bytes = smallest * self.bytes_per_parameter // self.unit.other
            least, got = f"`size` to be {n_bytes:,} bytes", f"{self.size:,}"
        raise CompressionError(
            f"Expected {least} or more (ratio {math.floor(100 * self.whole / smallest) / 100:.2f} "
            f"at most), which is the smallest possible model, but got {got}: {reason}."
        )


@dataclass(frozen=True)
class Candidate:
    """The best table for one way of sharing layers.

    Attributes:
        options: with ranks and cutoffs.
        sharing: the scheme, in words.
        table: share of the table that is lost.
        hidden: relative error of the hidden states.
    """

    options: CompressionConfig
    sharing: str
    table: float
    hidden: float


class OptionSearch:
    """Looks for the options of an original that lose least within a budget.

    Args:
        original: what is compressed.
        counts: training interactions of each item id, `[n_items]`.
        base: the other options, without ranks and cutoffs.
        sharing: the scheme, or None to choose one.
        unit: what models are counted in.
        hidden_error: relative error of the hidden states under given options; None for an original
            that is not trained, of which only the counts say anything.
        importance: of the directions of a trained table, `[d, d]`; None: all are equal.
    """

    def __init__(
        self,
        original: Original,
        counts: np.ndarray,
        base: CompressionConfig,
        sharing: str | None = None,
        unit: Unit = PARAMETERS,
        hidden_error: Callable[[CompressionConfig], float] | None = None,
        importance: Tensor | None = None,
    ) -> None:
        self.original, self.counts, self.base = original, counts, base
        self.schemes = (sharing,) if sharing else SHARING_SCHEMES
        self.unit, self.hidden_error, self.importance = unit, hidden_error, importance
        self.cost = TableCost.under(base, original.dim, unit)
        rank_one = BlockPlan((1,), (original.n_items,), original.dim)
        self.least_table = self.cost.of(rank_one)
        self.least_layers = min(self._layer_cost(scheme) for scheme in self.schemes)

    @property
    def smallest(self) -> int:
        """What the smallest model costs: one block of rank 1, as much shared as may be."""
        return self.least_table + self.least_layers

    def best(self, budget: Budget) -> ChosenOptions:
        """The options that lose least within a budget.

        For each way of sharing layers that leaves room for a table, the best table is found; then
        what the table loses is added to what the hidden states lose, both as relative squared
        errors, and the least sum wins.

        Raises:
            CompressionError: the budget is below the smallest possible model.
        """
        budget.check(
            self.smallest,
            f"{self.least_layers:,} are in the layers, shared as far as they can be, "
            f"{self.least_table:,} in a table of rank 1",
        )
        found: list[Candidate] = []
        crowded: list[str] = []
        for scheme, in_words, freedom in self._different_schemes():
            layers = self._layer_cost(scheme)
            plan = self._spectra.best_plan(budget.limit - layers, self.cost)
            if plan is None:
                crowded.append(f"{in_words} leaves no room for a table ({layers:,} in the layers)")
                continue
            ranks, cutoffs = plan.ranks, plan.cutoffs
            options = replace(self.base, sharing=scheme, ranks=ranks, cutoffs=cutoffs)
            if self.hidden_error is None:
                hidden = _FRESH_SHARING * (1 - freedom)
            else:
                hidden = self.hidden_error(options)
            found.append(Candidate(options, in_words, self._spectra.loss(plan), hidden))
        best = min(found, key=lambda candidate: candidate.table + candidate.hidden)
        plan = best.options.plan(self.original.dim, self.original.n_items)
        total = self.cost.of(plan) + self._layer_cost(best.options.sharing)
        others = [candidate for candidate in found if candidate is not best]
        reasons = self._reasons(best, others, crowded)
        return ChosenOptions(best.options, total, budget.limit, reasons, self.unit.name)

    @cached_property
    def _spectra(self) -> Spectra:
        ends = block_ends(self.original.n_items)
        if self.hidden_error is None:
            return Spectra.of_counts(self.counts**_FRESH_POWER, self.original.dim, ends)
        weights = self.counts**_TRAINED_POWER
        return Spectra.of_table(self.original.table, weights, ends, self.importance)

    def _layer_cost(self, scheme: str) -> int:
        """What everything but the table and the softmax costs."""
        layers = layer_parameters(self.original.spec, self.original.inner, scheme)
        return sum(self.unit.parameter(p) for p in layers)

    def _different_schemes(self) -> list[tuple[str, str, float]]:
        """Schemes that differ on this model: name, in words, and the share of free sets left."""
        seen: dict[tuple[tuple[int, ...], ...], tuple[str, str, float]] = {}
        for scheme in self.schemes:
            layers, sets = self.original.spec.sharing(self.original.inner, scheme)
            freedom = (len(sets) - 1) / (len(layers) - 1) if len(layers) > 1 else 1.0
            entry = (scheme, describe_sharing(scheme, len(layers), len(sets)), freedom)
            seen.setdefault(tuple(tuple(members) for members in sets), entry)
        return list(seen.values())

    def _reasons(
        self, best: Candidate, others: list[Candidate], crowded: list[str]
    ) -> tuple[str, ...]:
        ranks, cutoffs = best.options.ranks or (), best.options.cutoffs or ()
        blocks = zip(ranks, (0, *cutoffs), cutoffs)
        table = ", ".join(f"rank {rank} for {end - start:,.0f}" for rank, start, end in blocks)
        basis = (
            f"untrained: by the fourth root of the counts, an expected loss of {best.table:.1%}"
            if self.hidden_error is None
            else "by the spectra of the trained table, items weighted by the cube root of their "
            f"counts and directions by how they are scored, it loses {best.table:.1%}"
        )
        error = "taken to cost" if self.hidden_error is None else "error of the hidden states"
        reasons = [f"items from head to tail: {table}; {basis}"]
        reasons.append(f"sharing {best.sharing}: {error} {best.hidden:.1%}")
        reasons += [
            f"not {other.sharing}: table {other.table:.1%} and {error} {other.hidden:.1%}"
            for other in others
        ]
        reasons += [f"not possible: {reason}" for reason in crowded]
        return tuple(reasons)
