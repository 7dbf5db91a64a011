"""Ranks, cutoffs and sharing for a budget: a number of times smaller, or a size in bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cprec_recbole.compression.clusters import fit_clusters_to
from cprec_recbole.compression.importance import hidden_moment, importance_of
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.spectra import Spectra, block_ends, looks_trained
from cprec_recbole.compression.warm_start import warm_start
from cprec_recbole.config import (
    SHARING_SCHEMES,
    BlockPlan,
    CompressionConfig,
    CompressionError,
    is_number,
    size_in_bytes,
)
from cprec_recbole.costs import PARAMETERS, TableCost, Unit, describe_sharing, layer_parameters
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.results import ChosenOptions

_LOOK_HISTORIES = 64  # on which ways of sharing are compared
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


class Candidate(NamedTuple):
    """The best table for one way of sharing layers.

    Attributes:
        options: with ranks and cutoffs.
        cost: of the whole model.
        sharing: the scheme, in words.
        table: share of the table that is lost.
        hidden: relative error of the hidden states.
    """

    options: CompressionConfig
    cost: int
    sharing: str
    table: float
    hidden: float


class OptionSearch:
    """An original on its way to compressed models, under options that are given or found.

    Args:
        original: what is compressed.
        counts: training interactions of each item id, `[n_items]`.
        histories: what is fitted on, `[N, L]`.
        base: the options, or those besides ranks and cutoffs.
        sharing: the scheme, or None to choose one.
        unit: what models are counted in.
    """

    def __init__(
        self,
        original: Original,
        counts: np.ndarray,
        histories: Tensor,
        base: CompressionConfig,
        sharing: str | None = None,
        unit: Unit = PARAMETERS,
    ) -> None:
        self.original, self.counts, self.histories = original, counts, histories
        self.base, self.unit = base, unit
        self.is_trained = looks_trained(original.table)
        self.moment = hidden_moment(original, histories) if self.is_trained else None
        self.cost = TableCost.under(base, original.dim, unit)
        self.least_table = self.cost.of(BlockPlan((1,), (original.n_items,), original.dim))
        # what everything but the table and the softmax costs under each scheme
        self.layer_costs = {}
        for scheme in (sharing,) if sharing else SHARING_SCHEMES:
            parameters = layer_parameters(original.spec, original.inner, scheme)
            self.layer_costs[scheme] = sum(unit.parameter(p) for p in parameters)
        self.least_layers = min(self.layer_costs.values())
        self.whole = unit.other * original.n_parameters
        self.smallest = self.least_table + self.least_layers

    def compressed(self, options: CompressionConfig) -> CompressedRecommender:
        """The compressed model for given options, as near to a trained original as it gets."""
        small = self.original.compressed(options, self.counts, self.moment)
        if self.is_trained:
            small.warm_start = warm_start(small, self.original, self.histories)
            fit_clusters_to(small, self.original, self.histories)
        return small

    def within(self, limit: int) -> CompressedRecommender:
        """The best compressed model that costs at most `limit`."""
        choice = self.best(limit)
        small = self.compressed(choice.compression)
        small.choice = choice
        return small

    def limit_of_size(self, size: int) -> int:
        """What a model may cost whose weights take at most `size` bytes; a CompressionError where
        there is none."""
        itemsize = self.original.dtype.itemsize
        limit = size * self.unit.other // itemsize
        if limit < self.smallest:
            n_bytes = self.smallest * itemsize // self.unit.other
            raise self._too_small(f"`size` to be {n_bytes:,} bytes", f"{size:,}")
        return limit

    def best(self, limit: int) -> ChosenOptions:
        """The options that lose least and cost at most `limit`.

        For each way of sharing layers that leaves room for a table, the best table is found; then
        what the table loses is added to what the hidden states lose, both as relative squared
        errors, and the least sum wins.

        Raises:
            CompressionError: the limit is below the smallest possible model.
        """
        if limit < self.smallest:
            least = f"a budget of {self.smallest:,} {self.unit.name}"
            raise self._too_small(least, f"{limit:,}")
        candidates: list[Candidate] = []
        impossible: list[str] = []
        seen: list[list[list[int]]] = []
        for scheme, layer_cost in self.layer_costs.items():
            layers, sets = self.original.spec.sharing(self.original.inner, scheme)
            if sets in seen:
                continue  # on this model the same as another scheme
            seen.append(sets)
            in_words = describe_sharing(scheme, len(layers), len(sets))
            plan = self._spectra.best_plan(limit - layer_cost, self.cost)
            if plan is None:
                why = f"{in_words} leaves no room for a table ({layer_cost:,} in the layers)"
                impossible.append(f"not possible: {why}")
                continue
            options = replace(self.base, sharing=scheme, ranks=plan.ranks, cutoffs=plan.cutoffs)
            if self.is_trained:
                hidden = self._hidden_error(options)
            else:
                freedom = (len(sets) - 1) / (len(layers) - 1) if len(layers) > 1 else 1.0
                hidden = _FRESH_SHARING * (1 - freedom)
            cost, table = self.cost.of(plan) + layer_cost, self._spectra.loss(plan)
            candidates.append(Candidate(options, cost, in_words, table, hidden))
        best = min(candidates, key=lambda candidate: candidate.table + candidate.hidden)
        reasons = (*self._reasons(best, candidates), *impossible)
        return ChosenOptions(best.options, best.cost, limit, reasons, self.unit.name)

    @cached_property
    def _spectra(self) -> Spectra:
        ends = block_ends(self.original.n_items)
        if not self.is_trained:
            return Spectra.of_counts(self.counts**_FRESH_POWER, self.original.dim, ends)
        importance = importance_of(self.moment, tied=True)
        return Spectra.of_table(self.original.table, self.counts**_TRAINED_POWER, ends, importance)

    def _hidden_error(self, options: CompressionConfig) -> float:
        """Relative error of the hidden states under some options."""
        small = self.original.compressed(options, self.counts, self.moment)
        start = warm_start(
            small, self.original, self.histories, descend=False, look_at=_LOOK_HISTORIES
        )
        return start.refitted

    def _reasons(self, best: Candidate, candidates: list[Candidate]) -> list[str]:
        ranks, cutoffs = best.options.ranks or (), best.options.cutoffs or ()
        blocks = zip(ranks, (0, *cutoffs), cutoffs)
        table = ", ".join(f"rank {rank} for {end - start:,.0f}" for rank, start, end in blocks)
        if self.is_trained:
            basis = (
                "by the spectra of the trained table, items weighted by the cube root of their "
                "counts and directions by how they are scored, it loses"
            )
            error = "error of the hidden states"
        else:
            basis = "untrained: by the fourth root of the counts, an expected loss of"
            error = "taken to cost"
        return [
            f"items from head to tail: {table}; {basis} {best.table:.1%}",
            f"sharing {best.sharing}: {error} {best.hidden:.1%}",
            *(
                f"not {other.sharing}: table {other.table:.1%} and {error} {other.hidden:.1%}"
                for other in candidates
                if other is not best
            ),
        ]

    def _too_small(self, least: str, got: str) -> CompressionError:
        ratio = math.floor(100 * self.whole / self.smallest) / 100
        return CompressionError(
            f"Expected {least} or more (ratio {ratio:.2f} at most), which is the smallest possible "
            f"model, but got {got}: {self.least_layers:,} are in the layers, shared as far as they "
            f"can be, {self.least_table:,} in a table of rank 1."
        )
