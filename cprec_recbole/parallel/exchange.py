"""What processes tell each other in a step, with gradients: rows to all, and back to their owners.

`group.py` is about membership, and what is said between steps.

Every process of the group must call these in the same order with tensors of the same shape; their
gradients are exchanged in the reverse order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cprec_recbole.parallel import group

_GATHER = "all_gather_single"  # since torch 2.13; before, all_gather_into_tensor
_gather_into: Callable[..., Any] = getattr(dist, _GATHER, None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Group:
    """Processes that share something, as one of them sees it.

    Attributes:
        rank: number of this process.
        world: number of processes.
    """

    rank: int
    world: int

    @classmethod
    def current(cls) -> Group | None:
        """All processes of the run; None where there are not several."""
        return cls(group.rank(), group.size()) if group.size() > 1 else None

    def rows(self, size: int) -> slice:
        """Rows of a block of a size that this process has, as torch's `Shard(0)` deals them."""
        share = -(-size // self.world)
        return slice(min(size, self.rank * share), min(size, (self.rank + 1) * share))

    def most(self, n: int, device: torch.device) -> int:
        """The largest of the numbers that the processes name."""
        number = torch.tensor(n, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def gather(self, own: Tensor) -> Tensor:
        """Everybody's rows one after the other, `[n, ...] -> [world * n, ...]`."""
        return cast(Tensor, _Gather.apply(own, self.world))

    def give_back(self, everyones: Tensor) -> Tensor:
        """Sum over processes of what each has for this one's rows, `[world * n, ...] -> [n, ...]`;
        the reverse of `gather`."""
        return cast(Tensor, _GiveBack.apply(everyones, self.world))

    def swap(self, everyones: Tensor) -> Tensor:
        """What each process has for this one's rows, `[world * n, ...] -> [world, n, ...]`."""
        return cast(Tensor, _Swap.apply(everyones)).unflatten(0, (self.world, -1))

    def sum(self, own: Tensor) -> Tensor:
        """Sum over processes, of the same shape; so is the gradient's."""
        return cast(Tensor, _Sum.apply(own))


def _gathered(own: Tensor, world: int) -> Tensor:
    found = own.new_empty(world * len(own), *own.shape[1:])
    _gather_into(found, own.contiguous())
    return found


def _swapped(everyones: Tensor) -> Tensor:
    found = torch.empty_like(everyones, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found, everyones.contiguous())
    return found


def _given_back(everyones: Tensor, world: int) -> Tensor:
    return _swapped(everyones).unflatten(0, (world, -1)).sum(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, world: int) -> Tensor:
        ctx.world = world
        return _gathered(own, world)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _given_back(gradient, ctx.world), None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, everyones: Tensor, world: int) -> Tensor:
        ctx.world = world
        return _given_back(everyones, world)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.world), None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, everyones: Tensor) -> Tensor:
        return _swapped(everyones)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _swapped(gradient)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        found = own.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found = gradient.clone()
        dist.all_reduce(found)
        return found
