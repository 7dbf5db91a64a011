"""The first pass of a search: the largest logit of each group of rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.int8 import Int8Rows

_PIECE = 2**19  # logits at a time: 2 MiB in float32, which stay in the cache
_LANES = 32  # a few queries take as long as this many
_LOG2_E = math.log2(math.e)


def group_maxima(
    rows: Tensor | Int8Rows,
    query: Tensor,
    size: int,
    excluded: tuple[Tensor, Tensor] | None = None,
    *,
    with_sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """Largest logit of each group of rows for each query; a logit is a row times a query.

    Rows come first and the batch second: so products, maxima and sums of a thin batch all run along
    contiguous memory.

    Args:
        rows: `[n, r]`; a group is a run of `size` of them, and the last one may be shorter.
        query: `[r, B]`.
        size: rows to a group.
        excluded: logits that do not count, as rows, rising, and queries, `[M], [M]`.
        with_sums: whether the second result is wanted.

    Returns:
        The maxima, `[G, B]`, -inf where all of a group is excluded; and the log of the summed
        exponentials of all logits, excluded ones too, `[B]`, in float64.
    """
    n_queries = query.shape[1]
    query = F.pad(query, (0, -n_queries % _LANES)) if n_queries > 1 else query
    n_groups = -(-len(rows) // size)
    per_piece = max(1, min(n_groups, _PIECE // (size * query.shape[1])))
    maxima = query.new_empty(n_groups, query.shape[1])
    buffer = query.new_empty(per_piece * size, query.shape[1])
    peak = torch.full_like(query[0], -torch.inf)
    total = torch.zeros_like(peak, dtype=torch.float64)
    firsts = list(range(0, n_groups, per_piece))
    cuts = [0] * (len(firsts) + 1)
    if excluded is not None and n_groups:
        out, columns = excluded
        ends = torch.tensor([*firsts, n_groups], device=out.device) * size
        cuts = torch.searchsorted(out, ends).tolist()
    for i, first in enumerate(firsts):
        start, end = first * size, min(len(rows), (first + per_piece) * size)
        best = maxima[first : first + per_piece]
        logits = best if size == 1 and not with_sums else buffer[: end - start]
        if isinstance(rows, Int8Rows):
            rows.multiply(start, end, query, logits)
        else:
            torch.mm(rows[start:end], query, out=logits)
        _maxima(logits, size, best)
        here = slice(cuts[i], cuts[i + 1])
        is_cut = here.start < here.stop
        if with_sums:
            higher = torch.maximum(peak, best.amax(0))
            powers = logits.clone() if is_cut else logits
            # powers of two: exp2 takes half the time of exp
            sums = powers.sub_(higher).mul_(_LOG2_E).exp2_().sum(0)
            total, peak = total * (peak - higher).double().exp() + sums, higher
        if is_cut:
            logits[out[here] - start, columns[here]] = -torch.inf
            _maxima(logits, size, best)
    return maxima[:, :n_queries], (peak.double() + total.log())[:n_queries]


def _maxima(logits: Tensor, size: int, into: Tensor) -> None:
    """Maxima of runs of `size` rows, `[n, B] -> [G, B]`."""
    if logits is into:  # one row to a group
        return
    n_whole = len(logits) // size
    whole = logits[: n_whole * size].view(n_whole, size, logits.shape[1])
    torch.amax(whole, 1, out=into[:n_whole])
    if n_whole < len(into):
        torch.amax(logits[n_whole * size :], 0, out=into[n_whole])
