"""The processes that train one model: where this one stands, what they tell each other, and its
part of the rows. A process that is alone needs no group: all functions answer for one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cprec_recbole.config import CompressionError

T = TypeVar("T")
STAND_IN = "is_stand_in"  # an attribute of a batch of which this process has no row


class Place(NamedTuple):
    """Where a process stands: its number among all processes, then among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    meeting: str  # where they find each other, an `init_method` of torch.distributed


place: Place | None = None  # where this process will stand; RecBole's Config joins the group there


def place_of_torchrun() -> Place | None:
    """The place that torchrun gives this process; None outside of it, and for one process alone. A
    CompressionError for its variables where they do not fit each other."""
    given = os.environ
    if not given.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = {name: given.get(name, given["WORLD_SIZE"]) for name in names}
    if all(value.isdecimal() for value in values.values()):
        rank, size, local_rank, local_size = map(int, values.values())
        if rank < size and local_rank < local_size:
            return Place(rank, size, local_rank, local_size, "env://") if size > 1 else None
    raise CompressionError(f"Expected {', '.join(names)} as torchrun sets them, but got {values}.")


def join(here: Place, *, gpus: bool) -> None:
    """Become a member, where each process may have a GPU of its own; waits for the others."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, here.meeting, rank=here.rank, world_size=here.size)


def leave() -> None:
    """End the membership, if there is one."""
    global place
    place = None
    if _joined():
        dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def wait() -> None:
    """Wait until every process is here."""
    total(torch.zeros(1))  # dist.barrier() would ask for a GPU where there are any


def total(values: Tensor) -> Tensor:
    """The sum over all processes, `[...] -> [...]`; the tensor itself is changed."""
    if _joined():
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """What each process gives, in their order, on every process; for tensors of the CPU."""
    if not _joined():
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def part_of(n: int, number: int, parts: int) -> range:
    """Which of `n` rows the `number`-th of `parts` processes takes: each row goes to one process,
    in their order; some get none where there are fewer rows than processes."""
    return range(number * n // parts, (number + 1) * n // parts)


def collate_part(
    collate: Callable[[Sequence[int]], Any], number: int, parts: int, index: Sequence[int]
) -> Any:
    """One process's rows of a batch `[B]` that all draw alike. One without rows gets another's,
    marked as STAND_IN, that counts for nothing: every process has to take part in every step."""
    mine = part_of(len(index), number, parts)
    if mine:
        return collate(index[mine.start : mine.stop])
    batch = collate(index[:1])
    setattr(batch, STAND_IN, True)
    return batch
