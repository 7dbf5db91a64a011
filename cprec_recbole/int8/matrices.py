"""Matrices that are kept in int8 and computed in float: of layers, projections and clusters.

A table's rows stay in int8 in memory (see `int8`), for there are millions of them. Every other
matrix is small, so it is in int8 in the folder alone: in memory it holds, in float, the very
products of its whole numbers and scales, and whatever computes it goes on as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor, nn

from cprec_recbole.int8.rows import SCALE_DTYPE, quantized_rows


def float_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters with rows and columns, but for those that are in int8, and their names: by
    name, so that nothing depends on the order in which a model makes them."""
    for name, parameter in sorted(model.named_parameters(), key=itemgetter(0)):
        if parameter.ndim > 1 and parameter.numel() and parameter.is_floating_point():
            yield name, parameter


@torch.no_grad()
def round_to_int8(matrix: Tensor) -> Tensor:
    """Change a matrix `[n, ...]` to the nearest whole numbers times a scale a row, as a block's
    rows are; returns the scales `[n]`."""
    values, scales = quantized_rows(matrix.flatten(1))
    matrix.copy_(_products(values, scales, matrix))
    return scales


@torch.no_grad()
def whole_numbers(matrix: Tensor, scales: Tensor | None) -> Tensor | None:
    """What a matrix `[n, ...]` was rounded to, in int8; None where it has been changed since, or
    never was rounded."""
    if scales is None:
        return None
    scales = scales.to(matrix.device)
    values = (matrix.flatten(1).double() / scales.double().unsqueeze(1)).round()
    values = values.clamp(-128, 127).to(torch.int8)
    same = torch.equal(_products(values, scales, matrix), matrix)
    return values.view(matrix.shape) if same else None


@torch.no_grad()
def fill_from_int8(matrix: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Give a matrix what was kept of one; returns the scales as `round_to_int8` does."""
    scales = scales.to(matrix.dtype)
    matrix.copy_(_products(values.flatten(1), scales, matrix))
    return scales


def kept_scales(scales: list[Tensor]) -> Tensor:
    """The scales of several matrices as one tensor, in as few bits as they have."""
    return torch.cat([each.to("cpu", SCALE_DTYPE) for each in scales])


def _products(values: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    products = values.to(like.dtype) * scales.to(like.dtype).unsqueeze(1)
    return products.view(like.shape)
