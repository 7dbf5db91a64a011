"""Groups of near rows, and what bounds the logits of all rows of a group.

Rows that lie close together have logits that lie close together, so that a few numbers for each
group bound all of its logits: the lower the rank, the tighter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_LOG2_E = math.log2(math.e)


class Reach(NamedTuple):
    """What bounds are multiplied by, for queries `z`.

    Attributes:
        ball: z and its length, `[r + 1, B]`.
        box: z and its absolute values, `[2 r, B]`.
    """

    ball: Tensor
    box: Tensor

    @classmethod
    def of(cls, query: Tensor) -> Reach:
        """Of queries, `[r, B]`."""
        length = torch.linalg.vector_norm(query, dim=0, keepdim=True)
        return cls(torch.cat([query, length]), torch.cat([query, query.abs()]))


@dataclass(frozen=True)
class Bounds:
    """What is known of the rows of each group.

    Attributes:
        ball: centre and radius, `[G, r + 1]`.
        box: middle and half of the widths along each axis, `[G, 2 r]`.
        log_sizes: log2 of the number of rows, `[G, 1]`.
    """

    ball: Tensor
    box: Tensor
    log_sizes: Tensor

    @classmethod
    def of(cls, rows: Tensor, real: Tensor) -> Bounds:
        """Bounds of grouped rows, `[G, s, r]`; rows not marked real, `[G, s]`, are copies, of which
        a group may have nothing else."""
        sizes = real.sum(1, keepdim=True)
        weights = real.unsqueeze(2).to(rows.dtype)
        centres = (rows * weights).sum(1) / sizes.clamp(min=1)
        radius = ((rows - centres.unsqueeze(1)).norm(dim=2) * real).amax(1, keepdim=True)
        low, high = rows.amin(1), rows.amax(1)
        middle, half = (low + high) / 2, (high - low) / 2
        # wider by what rounding may do to the products
        error = (2 * rows.shape[2] + 8) * torch.finfo(rows.dtype).eps
        radius += error * (radius + centres.norm(dim=1, keepdim=True))
        half += error * (half + middle.abs())
        ball, box = torch.cat([centres, radius], dim=1), torch.cat([middle, half], dim=1)
        return cls(ball, box, sizes.log2().to(rows.dtype))

    def above(self, reach: Reach) -> Tensor:
        """A number that no logit of the group exceeds, `[G, B]`.

        The smaller of `z . centre + |z| radius` and of the same for the box, whose half widths
        meet the absolute values of z.
        """
        upper = self.ball @ reach.ball
        return torch.minimum(upper, self.box @ reach.box, out=upper)

    def log_sum_below(self, query: Tensor) -> Tensor:
        """A number that the log of the summed exponentials of all rows is not below, `[B]`.

        By Jensen a group of n rows sums to at least `n exp(z . centre)`.
        """
        mean = torch.addmm(self.log_sizes, self.ball[:, :-1], query * _LOG2_E)
        peak = mean.amax(0)
        return (peak + mean.sub_(peak).exp2_().sum(0).log2()).double() / _LOG2_E


def group_rows(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sort rows into equal groups of near ones, `[N, r] -> [G, s], [G, s]` with `s <= size`.

    All rows are halved at the median of their principal direction, both halves likewise, and so on:
    a balanced tree, whose leaves are the groups. An odd half gets one of its rows twice.

    Returns:
        The rows of each group, and which of them are real: of each row exactly one is.
    """
    depth = max(0, math.ceil(math.log2(len(rows) / size)))
    order = torch.arange(len(rows), device=rows.device).unsqueeze(0)
    for _ in range(depth):
        members = rows[order]
        members = members - members.mean(1, keepdim=True)
        direction = _principal_direction(members.transpose(1, 2) @ members)
        order = order.gather(1, (members @ direction).squeeze(2).argsort(dim=1))
        if order.shape[1] % 2:
            order = torch.cat([order, order[:, -1:]], dim=1)
        order = order.reshape(2 * len(order), -1)
    slots = torch.arange(order.numel(), device=rows.device)
    first = slots.new_full((len(rows),), order.numel())
    first.scatter_reduce_(0, order.flatten(), slots, "amin")
    return order, (first[order.flatten()] == slots).view(order.shape)


def _principal_direction(scatter: Tensor) -> Tensor:
    """Eigenvector of the largest eigenvalue, `[m, r, r] -> [m, r, 1]`; where it is not found, which
    happens among equal rows, the axis of the largest spread. Any direction makes groups."""
    try:
        return torch.linalg.eigh(scatter).eigenvectors[:, :, -1:]
    except torch.linalg.LinAlgError:
        spread = torch.diagonal(scatter, dim1=1, dim2=2)
        axes = torch.nn.functional.one_hot(spread.argmax(1), spread.shape[1])
        return axes.to(scatter.dtype).unsqueeze(2)
