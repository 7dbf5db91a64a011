"""Tensors whose rows are spread over processes (torch's DTensor): this process's part of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cprec_recbole.config import CompressionError


def own_rows(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is spread over processes (torch's DTensor); any other
    tensor as it is."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def spread_as(rows: Tensor, like: Tensor) -> Tensor:
    """The reverse of `own_rows`: rows of this process, spread as another tensor is."""
    if not hasattr(like, "to_local"):
        return rows
    kind: Any = type(like.detach())  # a parameter's kind is Parameter
    spread_like: Any = like
    return kind.from_local(
        *(rows.to(like.device), spread_like.device_mesh, spread_like.placements),
        shape=like.shape,
        stride=like.stride(),
        run_check=False,
    )


def check_whole(name: str, *tables: Any) -> None:
    """Raise a CompressionError where a model's tail blocks are spread over processes.

    Args:
        name: what the message calls the model.
        tables: its table of items, and that of its softmax.
    """
    if any(table.group is not None for table in tables):
        raise CompressionError(
            f"Expected `{name}` to be whole, but its tail blocks are spread over processes; load "
            "the run's best.pth in one process."
        )
