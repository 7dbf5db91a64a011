"""The processes that train one model: where this one stands, and what they tell each other.

Tensors on the CPU go through Gloo, those on a GPU through NCCL. A process that is alone needs no
group: every function here then answers for one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cprec_recbole.config import CompressionError

T = TypeVar("T")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands.

    Attributes:
        rank: its number among all processes, from 0.
        size: how many processes there are.
        local_rank: its number among those of this machine.
        local_size: how many there are on this machine.
        meeting: where they find each other, an `init_method` of torch.distributed.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    meeting: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place | None:
        """The place that torchrun gives a process; None outside of it, and for one process alone.

        Raises:
            CompressionError: torchrun's variables, but not numbers that fit each other.
        """
        if not all(name in environment for name in _TORCHRUN):
            return None
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = {name: environment.get(name, environment["WORLD_SIZE"]) for name in names}
        try:
            rank, size, local_rank, local_size = (int(values[name]) for name in names)
        except ValueError:
            rank = size = local_rank = local_size = -1
        if not (0 <= rank < size and 0 <= local_rank < local_size):
            raise CompressionError(
                f"Expected {', '.join(names)} as torchrun sets them, but got {values}."
            )
        return cls(rank, size, local_rank, local_size, "env://") if size > 1 else None


place: Place | None = None  # where this process will stand; RecBole's Config joins the group there


def join(here: Place, *, gpus: bool) -> None:
    """Become a member; waits for the others.

    Args:
        here: where this process stands.
        gpus: whether each process has a GPU of its own.
    """
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            init_method=here.meeting,
            rank=here.rank,
            world_size=here.size,
        )


def leave() -> None:
    """End the membership, if there is one."""
    global place
    place = None
    if joined():
        dist.destroy_process_group()


def joined() -> bool:
    """Whether this process is a member of a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if joined() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if joined() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def wait() -> None:
    """Wait until every process is here."""
    if joined():
        dist.all_reduce(torch.zeros(1))  # dist.barrier() would ask for a GPU where there are any


def total(values: Tensor) -> Tensor:
    """The sum over all processes, `[...] -> [...]`; the tensor itself is changed."""
    if joined():
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """What each process gives, in their order, on every process; for tensors of the CPU."""
    if not joined():
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def part_of(n: int, number: int, parts: int) -> range:
    """Which of `n` rows the `number`-th of `parts` processes takes.

    Each row goes to one process, in their order; where there are fewer rows than processes, some
    processes get none.
    """
    return range(number * n // parts, (number + 1) * n // parts)
