"""Ranks, cutoffs and sharing for a budget: a number of times smaller, a size, or a loss."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
from torch import Tensor

from cprec_recbole.compression.original import Original, hidden_moment, importance_of
from cprec_recbole.compression.quantize import quantize
from cprec_recbole.compression.spectra import Spectra, block_ends, looks_trained
from cprec_recbole.compression.warm_start import fit_clusters_to, warm_start
from cprec_recbole.config import (
    SHARING_SCHEMES,
    CompressionConfig,
    CompressionError,
    check_number,
    size_in_bytes,
)
from cprec_recbole.costs import PARAMETERS, TableCost, Unit, describe_sharing, layer_parameters
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.results import ChosenOptions
from cprec_recbole.training.evaluation import evaluate, valid_metric

# Items weigh by these powers of their counts: by the counts themselves the tail would get rank 1,
# from which training cannot bring it back (docs/compressing.md)
_TRAINED_POWER = 1 / 3
# On lastfm (1,090 users) at ratio 3.5 it makes one block for SASRec and two for NextItNet, .0221 on
# test, where one rank for all reached .0281
_FRESH_POWER = 1 / 4
# What sharing is taken to cost a model that is trained afterwards, when all layers become one set:
# as much as losing a twentieth of the table. On MovieLens-100K it cost nothing (docs/method.md).
_FRESH_SHARING = 0.05
_N_RATIOS = 24  # between which max_loss is searched: five evaluations find one of them
_LEAST_RATIO = 1.25
# how a choice is explained: what blocks and ranks are chosen by, and what is said of sharing
_ON_FRESH = "untrained: by the fourth root of the counts, an expected loss of", "taken to cost"
_ON_TRAINED = (
    "by the spectra of the trained table, items weighted by the cube root of their counts and "
    "directions by how they are scored, it loses",
    "error of the hidden states",
)


def checked_ratio(ratio: object, option: str = "ratio") -> float:
    """A ratio of parameters as a number; else a CompressionError that names the option."""
    return check_number(option, ratio, "a number of times, 1 or more", 1, sys.float_info.max)


def checked_bytes(size: object) -> int:
    """A size such as `"2MB"`, `"512 KiB"` or a number of bytes; else a CompressionError."""
    words = 'a number of bytes, or text such as "2MB" or "512KiB"'
    if (found := size_in_bytes(size)) is None:
        raise CompressionError(f"Expected `size` to be {words}, but got {size!r}.")
    return found


class OptionSearch:
    """An original on its way to compressed models: counts `[n_items]` and histories `[N, L]` of the
    training data, all options but ranks and cutoffs, and the sharing, or None to choose one."""

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
        self.layer_costs = {}
        for scheme in (sharing,) if sharing else SHARING_SCHEMES:
            parameters = layer_parameters(original.spec, original.inner, scheme)
            self.layer_costs[scheme] = sum(map(unit.parameter, parameters))
        self.whole = unit.other * sum(p.numel() for p in original.model.parameters())
        self.least_table = int(self.cost.block(original.n_items, 1))
        self.smallest = self.least_table + min(self.layer_costs.values())

    def compressed(self, options: CompressionConfig) -> CompressedRecommender:
        """The compressed model for given options, fitted to a trained original."""
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

    def within_loss(self, max_loss: float, valid_data: Any) -> CompressedRecommender:
        """The smallest compressed model that loses at most a share of the validation metric, by
        bisection over ratios."""
        metric = valid_metric(valid_data)
        whole = evaluate(self.original.model, valid_data)[metric]
        if not whole > 0:
            raise CompressionError(
                f"Expected a `model` whose {metric} on `valid_data` is above 0, to measure "
                f"`max_loss` by, but got {whole:.4f}."
            )
        largest = self.whole / self.smallest
        ratios = np.geomspace(min(_LEAST_RATIO, largest), largest, _N_RATIOS)
        best: CompressedRecommender | None = None
        tried: list[str] = []
        low, high = -1, len(ratios)  # ratios[low] is good enough, ratios[high] is not
        while high - low > 1:
            middle = (low + high) // 2
            small = self.within(max(self.smallest, int(self.whole / ratios[middle])))
            measured = quantize(small, self.unit.dtype) if self.unit.dtype else small
            score = evaluate(measured, valid_data)[metric]
            tried.append(f"ratio {ratios[middle]:.2f}: {metric} {score:.4f}, {score / whole:.1%}")
            if score >= (1 - max_loss) * whole:
                low, best = middle, small
            else:
                high = middle
        if best is None or best.choice is None:
            raise CompressionError(
                f"Expected `max_loss` to be reachable without training, but got {max_loss}: "
                f"{'; '.join(tried)} of {whole:.4f}. Use ratio=... and recover()."
            )
        reason = f"measured, of {whole:.4f} on the validation data: {'; '.join(tried)}"
        best.choice = replace(best.choice, reasons=(*best.choice.reasons, reason))
        return best

    def best(self, limit: int) -> ChosenOptions:
        """The options that cost at most `limit` and lose least: of each sharing scheme with its
        best table, what table and hidden states lose is added, both as relative squared errors. A
        CompressionError where nothing fits."""
        if limit < self.smallest:
            n_bytes = self.smallest * self.original.dtype.itemsize // self.unit.other
            raise CompressionError(
                f"Expected a budget of {self.smallest:,} {self.unit.name} or more (ratio "
                f"{math.floor(100 * self.whole / self.smallest) / 100:.2f} at most, size "
                f"{n_bytes:,} at least), which is the smallest possible model, but got room for "
                f"{limit:,}: {self.smallest - self.least_table:,} are in the layers, shared as far "
                f"as they can be, {self.least_table:,} in a table of rank 1."
            )
        by, error = _ON_TRAINED if self.is_trained else _ON_FRESH
        found: list[tuple[float, ChosenOptions, str]] = []
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
                why = f"leaves no room for a table ({layer_cost:,} in the layers)"
                impossible.append(f"not possible: {in_words} {why}")
                continue
            options = replace(self.base, sharing=scheme, ranks=plan.ranks, cutoffs=plan.cutoffs)
            cost, table = self.cost.of(plan) + layer_cost, self._spectra.loss(plan)
            if self.is_trained:
                hidden = self._hidden_error(options)
            else:
                hidden = _FRESH_SHARING * (len(layers) - len(sets)) / max(1, len(layers) - 1)
            blocks = ", ".join(f"rank {r} for {size:,}" for r, size in zip(plan.ranks, plan.sizes))
            reasons = (
                f"items from head to tail: {blocks}; {by} {table:.1%}",
                f"sharing {in_words}: {error} {hidden:.1%}",
            )
            choice = ChosenOptions(options, cost, limit, reasons, self.unit.name)
            against = f"not {in_words}: table {table:.1%} and {error} {hidden:.1%}"
            found.append((table + hidden, choice, against))
        least = min(found, key=itemgetter(0))
        others = [each[2] for each in found if each is not least]
        return replace(least[1], reasons=(*least[1].reasons, *others, *impossible))

    @cached_property
    def _spectra(self) -> Spectra:
        ends = block_ends(self.original.n_items)
        if not self.is_trained:
            return Spectra.of_counts(self.counts**_FRESH_POWER, self.original.dim, ends)
        importance = importance_of(self.moment, tied=True)
        return Spectra.of_table(self.original.table, self.counts**_TRAINED_POWER, ends, importance)

    def _hidden_error(self, options: CompressionConfig) -> float:
        small = self.original.compressed(options, self.counts, self.moment)
        return warm_start(small, self.original, self.histories, quickly=True).refitted
