"""Negatives for a sampled softmax, drawn by popularity."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

    ends: Tensor
    log_expected: Tensor

    def __init__(self, counts: Tensor, n_draws: int, power: float) -> None:
        super().__init__()
        self.n_draws = n_draws
        weights = counts[1:].double().clamp(min=1) ** power
        expected = _expected(weights, n_draws)
        ends = expected.cumsum(0)
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("log_expected", expected.log().float(), persistent=False)

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, Tensor]:
        """Item ids and the log of how often each is expected, `[m], [m]`."""
        strata = torch.arange(self.n_draws, dtype=torch.float64, device=self.ends.device)
        points = strata + torch.rand_like(strata)
        # sums round: the last point may lie beyond the last end
        rows = torch.searchsorted(self.ends, points, right=True).clamp(max=len(self.ends) - 1)
        return rows + 1, self.log_expected[rows]


def _expected(weights: Tensor, n_draws: int) -> Tensor:
    """`min(1, c w)` with the c for which they sum to m, `[n]`."""
    falling, order = weights.sort(descending=True)
    rest = falling.flip(0).cumsum(0).flip(0)  # of each and all below
    left = n_draws - torch.arange(len(weights), device=weights.device)
    is_sure = (left * falling >= rest).cumprod(0).bool()  # drawn once, as all before it
    n_sure = int(is_sure.sum())
    expected = torch.ones_like(weights)
    if n_sure < len(weights):
        others = order[n_sure:]
        expected[others] = (n_draws - n_sure) * weights[others] / rest[n_sure]
    return expected
