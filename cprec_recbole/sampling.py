"""A softmax over sampled items: how negatives are drawn, and the loss of targets among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_TILE = 2**18  # logits at a time on a CPU: 1 MiB, which stays in the cache


class NegativeSampler(nn.Module):
    """Draws items of which item x is expected `p(x) = min(1, c count(x)^power)` times, m in all.

    Each of m equal parts of the summed `p` gives one item (stratified sampling), so that a draw
    spreads over popular and rare items, and takes as long as m look-ups in a sorted list. With as
    many draws as items, each is drawn once.

    Args:
        counts: training interactions by item id, padding included, `[n_items]`; an item that never
            occurred counts as seen once.
        n_draws: m, from 1 to the number of items.
        power: of the counts; 0 draws items alike.
    """

    ends: Tensor  # sums of the expectations of each item and all before it, `[n_items - 1]`

    def __init__(self, counts: Tensor, n_draws: int, power: float) -> None:
        super().__init__()
        self.n_draws = n_draws
        weights = counts[1:].double().clamp(min=1).pow_(power)
        self.register_buffer("ends", _expected(weights, n_draws).cumsum_(0), persistent=False)

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, Tensor]:
        """Item ids, rising, and the log of how often each is expected, `[m], [m]`."""
        strata = torch.arange(self.n_draws, dtype=torch.float64, device=self.ends.device)
        points = strata + torch.rand_like(strata)
        # sums round: the last point may lie beyond the last end
        rows = torch.searchsorted(self.ends, points, right=True).clamp(max=len(self.ends) - 1)
        return rows + 1, self.log_expected(rows + 1)

    def log_expected(self, items: Tensor) -> Tensor:
        """The log of how often items are expected in a draw, `[m] -> [m]`."""
        before = torch.where(items > 1, self.ends[(items - 2).clamp(min=0)], 0.0)
        return (self.ends[items - 1] - before).log().float()


def sampled_cross_entropy(
    hidden: Tensor,
    hit: Tensor,
    target: Tensor,
    vectors: Tensor,
    negatives: Tensor,
    log_expected: Tensor,
    memory: int,
) -> Tensor:
    """Summed cross-entropy of targets and a softmax over each target and all negatives but itself,
    `[]`. A negative's logit is less by the log of how often it is drawn (logQ; Bengio and Senecal,
    2008), so that in expectation the sum of exponentials is that over all items.

    Products are in float32 or more, also under autocast. Cannot be differentiated twice.

    Args:
        hidden: hidden states, `[N, d]`.
        hit: logits of the targets, `[N]`.
        target: their item ids, `[N]`.
        vectors: item vectors of the negatives, `[m, d]`.
        negatives: their item ids, rising, `[m]`.
        log_expected: see NegativeSampler, `[m]`.
        memory: bytes that logits may take at a time; one row fits in any case.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        kind = torch.promote_types(hidden.dtype, torch.float32)
        states, hits, rows = (each.to(kind) for each in (hidden, hit, vectors))
        size = memory // (kind.itemsize * max(1, len(negatives)))
        if hidden.device.type == "cpu":
            size = min(size, _TILE // max(1, len(negatives)))
        given = states, hits, target, rows, negatives, log_expected.to(kind), max(1, size)
        return _SampledCrossEntropy.apply(*given)


class _SampledCrossEntropy(torch.autograd.Function):
    """Value and gradient, some rows at a time; the gradient waits for its scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        hit: Tensor,
        target: Tensor,
        vectors: Tensor,
        negatives: Tensor,
        log_expected: Tensor,
        size: int,
    ) -> Tensor:
        # where the target is among the negatives: twice at most, since they rise and each is
        # expected once at most
        first = torch.searchsorted(negatives, target).clamp(max=len(negatives) - 1)
        own = torch.stack([first, (first + 1).clamp(max=len(negatives) - 1)], 1)
        never = torch.where(negatives[own] == target.unsqueeze(1), -torch.inf, 0.0).to(hit.dtype)
        total, d_hit = hit.new_zeros(()), torch.empty_like(hit)
        d_hidden, d_vectors = torch.empty_like(hidden), torch.zeros_like(vectors)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = torch.addmm(-log_expected, hidden[rows], vectors.T)
            logits.scatter_add_(1, own[rows], never[rows])
            peak = torch.maximum(logits.amax(1), hit[rows])
            share = logits.sub_(peak.unsqueeze(1)).exp_()
            of_hit = (hit[rows] - peak).exp()
            sums = share.sum(1) + of_hit
            total += (sums.log() + peak - hit[rows]).sum()
            share /= sums.unsqueeze(1)
            d_hit[rows] = of_hit / sums - 1
            torch.mm(share, vectors, out=d_hidden[rows])
            d_vectors.addmm_(share.T, hidden[rows])
        ctx.save_for_backward(d_hidden, d_hit, d_vectors)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        d_hidden, d_hit, d_vectors = ctx.saved_tensors
        return d_hidden * scale, d_hit * scale, None, d_vectors * scale, None, None, None


def _expected(weights: Tensor, n_draws: int) -> Tensor:
    """`min(1, c w)` with the c for which they sum to m, `[n]`; in place of the weights."""
    if n_draws == len(weights):
        return weights.fill_(1.0)
    falling, order = weights.topk(n_draws)  # no other is drawn in any case
    total = weights.sum()
    rest = total - falling.cumsum(0) + falling  # of each and all below
    left = n_draws - torch.arange(n_draws, device=weights.device)
    is_sure = (left * falling >= rest).cumprod(0).bool()  # drawn once, as all before it
    n_sure = int(is_sure.sum())
    rest_of_all = total - falling[:n_sure].sum()
    weights *= (n_draws - n_sure) / rest_of_all
    weights[order[:n_sure]] = 1.0
    return weights
