"""The first pass of a search: the largest logit of each group of rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.int8.rows import Int8Rows

_PIECE = 2**19  # logits at a time: 2 MiB in float32, which stay in the cache
_LANES = 32  # a few queries take as long as this many
_LOG2_E = math.log2(math.e)

Pairs = tuple[Tensor, Tensor]  # rows and queries, [M], [M]


def group_maxima(
    rows: Tensor | Int8Rows,
    query: Tensor,
    size: int,
    groups: Tensor | None = None,
    excluded: Pairs | None = None,
    *,
    with_sums: bool = False,
) -> Pairs:
    """Largest logit of each group of rows for each query; a logit is a row times a query.

    Rows come first and the batch second: so products, maxima and sums of a thin batch all run along
    contiguous memory.

    Args:
        rows: `[n, r]`; a group is a run of `size` of them, and the last one may be shorter.
        query: `[r, B]`.
        size: rows to a group.
        groups: which groups to read, rising, `[G]`, all of them whole; None for every group.
        excluded: logits that do not count, by rising row.
        with_sums: whether the second result is wanted.

    Returns:
        The maxima, `[G, B]`, -inf where all of a group is excluded; and the log of the summed
        exponentials of all logits, excluded ones too, `[B]`, in float64.
    """
    n_queries = query.shape[1]
    query = F.pad(query, (0, -n_queries % _LANES)) if n_queries > 1 else query
    n_groups = -(-len(rows) // size) if groups is None else len(groups)
    per_piece = max(1, min(n_groups, _PIECE // (size * query.shape[1])))
    firsts = range(0, n_groups, per_piece)
    maxima = query.new_empty(n_groups, query.shape[1])
    buffer = query.new_empty(per_piece * size, query.shape[1])
    peak = torch.full_like(query[0], -torch.inf)
    total = torch.zeros_like(peak, dtype=torch.float64)
    pairs = _by_piece(excluded, groups, size, [*firsts, n_groups])
    for i, first in enumerate(firsts):
        last = min(n_groups, first + per_piece)
        logits = _product(rows, query, size, slice(first, last), groups, buffer)
        best = _maxima(logits, size, maxima[first:last])
        out = pairs[i] if pairs else None
        if with_sums:
            higher = torch.maximum(peak, best.amax(0))
            powers = logits.clone() if out else logits
            # powers of two: exp2 takes half the time of exp
            part = powers.sub_(higher).mul_(_LOG2_E).exp2_().sum(0)
            total, peak = total * (peak - higher).double().exp() + part, higher
        if out:
            logits[out] = -torch.inf
            _maxima(logits, size, best)
    return maxima[:, :n_queries], (peak.double() + total.log())[:n_queries]


def _product(
    rows: Tensor | Int8Rows,
    query: Tensor,
    size: int,
    some: slice,
    groups: Tensor | None,
    buffer: Tensor,
) -> Tensor:
    """Logits of some of the groups, `[m, B]`."""
    if groups is not None and isinstance(rows, Tensor):
        part = rows.view(-1, size, rows.shape[1])[groups[some]].flatten(0, 1)
        return torch.mm(part, query, out=buffer[: len(part)])
    start, end = some.start * size, min(len(rows), some.stop * size)
    if isinstance(rows, Int8Rows):
        return rows.multiply(start, end, query, buffer[: end - start])
    return torch.mm(rows[start:end], query, out=buffer[: end - start])


def _maxima(logits: Tensor, size: int, out: Tensor) -> Tensor:
    """Maxima of runs of `size` rows, `[m, B] -> [G, B]`."""
    whole = len(logits) // size
    torch.amax(logits[: whole * size].view(whole, size, logits.shape[1]), 1, out=out[:whole])
    if whole < len(out):
        torch.amax(logits[whole * size :], 0, out=out[whole])
    return out


def _by_piece(
    excluded: Pairs | None, groups: Tensor | None, size: int, cuts: list[int]
) -> list[Pairs | None]:
    """The pairs that fall into each piece, rows counted from its first; cut at groups."""
    if excluded is None or len(cuts) < 2:
        return []
    rows, columns = excluded
    if groups is not None:  # rows as they come when only these groups are read
        at = torch.searchsorted(groups, rows // size).clamp(max=len(groups) - 1)
        inside = groups[at] == rows // size
        rows, columns = (at * size + rows % size)[inside], columns[inside]
    ends = torch.tensor(cuts, device=rows.device) * size
    at = torch.searchsorted(rows, ends).tolist()
    pairs = [(rows[a:b] - c * size, columns[a:b]) for a, b, c in zip(at, at[1:], cuts)]
    return [pair if len(pair[0]) else None for pair in pairs]
