"""Gradients added up over several processes, so that each takes the step that one alone would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cprec_recbole.config import CompressionError
from cprec_recbole.parallel import group
from cprec_recbole.parallel.spread import own_rows

_SMALL = 2**18  # numbers; gradients below this travel together


class GradientReducer:
    """Adds the gradients of a model's parameters up over the processes of a group.

    The sum, not the mean: each process weighs its loss by its part of the targets. A parameter that
    has a gradient on no process keeps none, as on one process alone, so that its optimizer leaves
    it; one that has a gradient somewhere counts as zero elsewhere. A sparse gradient stays sparse
    where it is sparse everywhere. Every process ends with the same numbers, bit for bit.

    Args:
        parameters: all of the model's, in the same order on every process.
        left_out: those whose gradients are whole on their process already.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], left_out: Iterable[nn.Parameter] = ()
    ) -> None:
        own = {id(parameter) for parameter in left_out}
        self.parameters = [p for p in parameters if p.requires_grad and id(p) not in own]

    def reduce(self) -> None:
        """Replace each gradient by the sum over all processes.

        Raises:
            CompressionError: a sparse gradient of another kind than an embedding's.
        """
        dense, sparse = self._found()
        small: list[Tensor] = []
        for index, parameter in enumerate(self.parameters):
            if sparse[index] and not dense[index]:
                parameter.grad = _sum_of_rows(parameter.grad, parameter)
            elif dense[index] or sparse[index]:
                grad = _as_dense(parameter)
                if grad.numel() < _SMALL:
                    small.append(grad)
                else:
                    dist.all_reduce(grad)
        _sum_together(small)

    def _found(self) -> tuple[list[int], list[int]]:
        """How many processes have a dense gradient of each parameter, and how many a sparse one."""
        grads = [parameter.grad for parameter in self.parameters]
        found = torch.tensor(
            [
                [grad is not None and not grad.is_sparse for grad in grads],
                [grad is not None and grad.is_sparse for grad in grads],
            ],
            dtype=torch.int64,
        )
        dense, sparse = group.total(found).tolist()
        return dense, sparse


def begin_alike(tensors: Iterable[Tensor]) -> None:
    """Give every process the values that the first one has, in place."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def clip_gradients(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    parted: Sequence[nn.Parameter] = (),
    **others: Any,
) -> Tensor:
    """Scale gradients down to a norm of at most `max_norm`; returns the norm before, `[]`.

    What `torch.nn.utils.clip_grad_norm_` does, for sparse gradients too, and for the whole gradient
    where some of it is on other processes.

    Args:
        parameters: all of the model's on this process.
        max_norm: the norm that is left at most.
        norm_type: which norm.
        parted: those of `parameters` of which every process holds other rows.
        others: more of torch's options, for dense gradients that are whole.

    Raises:
        CompressionError: such an option with other gradients.
    """
    norm_type = float(norm_type)
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # each row once
    grads = {id(p): p.grad for p in parameters if p.grad is not None}
    if not parted and not any(grad.is_sparse for grad in grads.values()):
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, **others)
    if others:
        raise CompressionError(
            "Expected `clip_grad_norm` to hold max_norm and norm_type alone with sparse gradients "
            f"or rows on several processes, but got {', '.join(others)}."
        )
    if not norm_type > 0:
        raise CompressionError(
            f"Expected the norm_type of `clip_grad_norm` to be above 0, but got {norm_type:g}."
        )
    device = parameters[0].device
    powers = {True: torch.zeros((), device=device), False: torch.zeros((), device=device)}
    parts = {id(parameter) for parameter in parted}
    for key, grad in grads.items():
        norm = torch.linalg.vector_norm(_values(grad), norm_type)
        here = powers[key in parts]
        powers[key in parts] = (
            torch.maximum(here, norm) if _is_max(norm_type) else here + (norm**norm_type)
        )
    if parted:
        elsewhere = dist.ReduceOp.MAX if _is_max(norm_type) else dist.ReduceOp.SUM
        dist.all_reduce(powers[True], elsewhere)
    if _is_max(norm_type):
        total = torch.maximum(powers[True], powers[False])
    else:
        total = (powers[True] + powers[False]) ** (1 / norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # torch's own rule
    for grad in grads.values():
        _values(grad).mul_(scale)
    return total


def _is_max(norm_type: float) -> bool:
    return norm_type == float("inf")


def _values(grad: Tensor) -> Tensor:
    """The numbers that this process has of a gradient, to be changed in place."""
    if grad.is_sparse:
        return grad._values()
    return own_rows(grad)


def _as_dense(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient as a dense one, made where it has none, `[...]`."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    elif not parameter.grad.is_contiguous():
        parameter.grad = parameter.grad.contiguous()
    return parameter.grad


def _sum_together(grads: Sequence[Tensor]) -> None:
    """Add small gradients up in one message for each kind of number, in place."""
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        alike = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in alike])
        dist.all_reduce(flat)
        for grad, part in zip(alike, flat.split([grad.numel() for grad in alike])):
            grad.copy_(part.view_as(grad))


def _sum_of_rows(grad: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """The sum of sparse gradients, sparse too: each process's rows, sent to all others."""
    if grad is None:
        index = torch.empty(0, dtype=torch.int64, device=parameter.device)
        values = parameter.new_empty((0, *parameter.shape[1:]))
    else:
        if grad.sparse_dim() != 1:
            raise CompressionError(
                "Expected sparse gradients to be of whole rows, as an embedding's are, but got one "
                f"of shape {tuple(grad.shape)} with {grad.sparse_dim()} sparse dimensions."
            )
        grad = grad.coalesce()  # fewer rows to send
        index, values = grad.indices()[0], grad.values()
    counts = group.total(_at(group.rank(), len(index))).tolist()
    longest = max(1, *counts)
    rows = [_filled(index, longest).new_empty(longest) for _ in counts]
    dist.all_gather(rows, _filled(index, longest))
    numbers = [values.new_empty((longest, *values.shape[1:])) for _ in counts]
    dist.all_gather(numbers, _filled(values, longest))
    indices = torch.cat([part[:n] for part, n in zip(rows, counts)]).unsqueeze(0)
    total = torch.cat([part[:n] for part, n in zip(numbers, counts)])
    return torch.sparse_coo_tensor(indices, total, parameter.shape).coalesce()


def _at(number: int, value: int) -> Tensor:
    """Zeros but for one place, `[processes]`."""
    row = torch.zeros(group.size(), dtype=torch.int64)
    row[number] = value
    return row


def _filled(rows: Tensor, length: int) -> Tensor:
    """Rows with rows of zeros after them, `[n, ...] -> [length, ...]`."""
    filled = rows.new_zeros((length, *rows.shape[1:]))
    filled[: len(rows)] = rows
    return filled
