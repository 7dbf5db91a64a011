"""Exact top-k where the tail blocks are spread over processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.embedding import Block, BlockEmbedding
from cprec_recbole.parallel.exchange import Group
from cprec_recbole.parallel.shards import ShardedBlock
from cprec_recbole.partition import PADDING
from cprec_recbole.search.topk import Barred, TopK, not_finite

_LOGITS = 2**23  # of one process at a time, in float64: 64 MiB
_MOST_LOG = 64.0  # more than the logarithm of any number of items
_DOUBT = 2.0**-20  # relative: logits so near to each other may be equal in the model's precision


class _Block(NamedTuple):
    """What is known of a block for each of this process's hidden states.

    Attributes:
        logits: the best of its items, `[B, m]`; -inf where there are fewer.
        positions: those items, `[B, m]`.
        normaliser: logarithm of the sum over the block, `[B]`.
    """

    logits: Tensor
    positions: Tensor
    normaliser: Tensor


def topk_of_shards(
    table: BlockEmbedding,
    clusters: Tensor | None,
    hidden: Tensor,
    k: int,
    barred: Barred,
    allowed: Tensor | None,
    group: Group,
) -> TopK:
    """The k best items of each of this process's rows; all processes must call it at once.

    Every process looks for the best of its own rows of a block for everybody's hidden states.

    Args:
        table: the factors.
        clusters: a tree's, `[n_blocks - 1, d]`; None for a flat softmax.
        hidden: hidden states, `[B, d]`; the processes may have different numbers of them.
        k: at most as many as each row has items left.
        barred: what each row must not get.
        allowed: positions of the only items that rows may get, the same for all processes.
        group: the processes.

    Raises:
        CompressionError: in every process, where one has hidden states that are no finite numbers.
    """
    hidden = hidden.double()
    n_rows, device = len(hidden), hidden.device
    if group.most(int(not hidden.isfinite().all()), device):  # all raise, so that none waits
        raise not_finite()
    most_rows = group.most(n_rows, device)
    counts = torch.bincount(barred.rows, minlength=1)
    wanted = group.most(k + int(counts.max()), device)  # so that enough are left without the barred
    everyone = group.gather(F.pad(hidden, (0, 0, 0, most_rows - n_rows)))
    found: list[_Block] = []
    reach = hidden.new_zeros(n_rows)
    if clusters is not None:
        reach = 2 * (hidden @ clusters.detach().double().T).abs().amax(1) + _MOST_LOG
    for block, start in zip(table.blocks, table.partition.starts):
        if isinstance(block, ShardedBlock):
            own = block.own_rows.detach().double()
            first = start + block.own.start
            far = group.gather(F.pad(reach, (0, most_rows - n_rows)))
            here = _best(own, block, first, everyone, wanted, allowed, far)
            parts = [group.swap(part)[:, :n_rows].transpose(0, 1) for part in here]
            logits, positions, normaliser = parts  # [B, world, ...]
            part = _Block(logits.flatten(1), positions.flatten(1), normaliser.logsumexp(1))
        else:
            rows = block.weight.detach().double()
            part = _best(rows, block, start, hidden, wanted, allowed, reach)
        found.append(part)
        if clusters is not None and len(found) == 1:  # the head's is in all scores
            reach = reach + 2 * part.normaliser.abs()
    return _merged(table, clusters, hidden, k, barred, found)


def _best(
    rows: Tensor,
    block: Block,
    first: int,
    hidden: Tensor,
    k: int,
    allowed: Tensor | None,
    reach: Tensor,
) -> _Block:
    """The best of some rows of a block for each hidden state: k, and all that rounding could not
    tell from the last of them.

    Args:
        rows: in float64, `[n, r]`.
        block: whose rows they are.
        first: position of the first of them.
        hidden: hidden states, `[B, d]`.
        k: how many.
        allowed: positions of the only items that count; None for all.
        reach: what a tree adds to the logits is at most that and what the logits themselves make,
            `[B]`; scores are rounded accordingly.
    """
    projection = block.projection
    codes = hidden if projection is None else hidden @ projection.detach().double().T
    if first == PADDING:
        rows, first = rows[1:], 1
    normalisers, parts = [], []
    size = max(1, _LOGITS // max(1, len(rows)))
    for some, beside in zip(codes.split(size), reach.split(size)):
        logits = some @ rows.T
        normalisers.append(logits.logsumexp(1))
        if allowed is not None:
            barred = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            here = allowed[(allowed >= first) & (allowed < first + len(rows))]
            barred[here - first] = False
            logits = logits.masked_fill(barred, -torch.inf)
        parts.append(_at_least(logits, min(k, len(rows)), beside.unsqueeze(1)))
    width = max([k, *(values.shape[1] for values, _ in parts)])
    group = Group.current()
    if isinstance(block, ShardedBlock) and group is not None:
        width = group.most(width, hidden.device)
    filled = [F.pad(v, (0, width - v.shape[1]), value=-torch.inf) for v, _ in parts]
    places = [F.pad(at, (0, width - at.shape[1])) + first for _, at in parts]
    empty = hidden.new_empty(0, width)
    return _Block(
        torch.cat([empty, *filled]),
        torch.cat([empty.long(), *places]),
        torch.cat([hidden.new_empty(0), *normalisers]),
    )


def _at_least(logits: Tensor, k: int, reach: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of each row, and as many more as may be equal to the last of them once a number
    of at most `reach` `[B, 1]` is added."""
    best = logits.topk(k, dim=1)
    if not len(logits) or not k or k == logits.shape[1]:
        return best.values, best.indices
    last = best.values[:, -1:]
    real = logits > -torch.inf
    largest = logits.abs().masked_fill(~real, 0).amax(1, keepdim=True)
    scale = 2 * largest.clamp(min=1) + reach  # a block's normaliser is about as large as those
    near = int(((logits >= last - _DOUBT * scale) & real).sum(1).max())
    if near > k:
        best = logits.topk(near, dim=1)
    return best.values, best.indices


def _merged(
    table: BlockEmbedding,
    clusters: Tensor | None,
    hidden: Tensor,
    k: int,
    barred: Barred,
    found: list[_Block],
) -> TopK:
    """The best of what the blocks have, by score in the model's precision, then by item id."""
    scores = [part.logits for part in found]
    if clusters is not None:
        branches = hidden @ clusters.detach().double().T
        whole = torch.cat([found[0].normaliser.unsqueeze(1), branches], 1).logsumexp(1)
        offsets = [-whole]
        offsets += [branches[:, j] - whole - part.normaliser for j, part in enumerate(found[1:])]
        scores = [score + offset.unsqueeze(1) for score, offset in zip(scores, offsets)]
    positions = torch.cat([part.positions for part in found], 1)
    every = torch.cat(scores, 1)
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1).expand_as(positions)
    hit = barred.hit(rows.flatten(), positions.flatten(), table.partition.n_items)
    every = every.masked_fill(hit.view_as(every), -torch.inf).to(table.blocks[0].weight.dtype)
    items = table.partition.item_at[positions].long()
    by_id = items.argsort(1)
    every, items = every.gather(1, by_id), items.gather(1, by_id)
    best = every.sort(dim=1, descending=True, stable=True)
    return TopK(items.gather(1, best.indices[:, :k]), best.values[:, :k].contiguous())
