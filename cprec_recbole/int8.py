"""Rows and matrices in int8, each row with a scale of its own.

A row w is kept as whole numbers q from -127 to 127 and a scale s: `w = s q`, off by at most s / 2.
Scales are numbers of bfloat16: eight bits times seven are exact in float32, so that float32 and
float64 read the very same row. A table is so in memory too; every other matrix, which is small, in
the folder alone: in memory it holds the very products in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor, nn

from cprec_recbole.config import CompressionError

LARGEST = 127  # symmetric: -128 is not used
SCALE_DTYPE = torch.bfloat16  # as which scales are kept in a folder
BYTES_PER_SCALE = 2
ROWS_AT_A_TIME = 2**15  # that are turned into float, or from it
_SMALLEST_SCALE = 2.0**-126  # so that no product of a scale is below float32's normal numbers


def quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 rows and their scales, `[k, r] -> [k, r] int8, [k]`, of finite float32 or
    float64: a scale is the smallest number of bfloat16 that brings the longest entry to 127 or
    below, so no entry is off by more than half of it."""
    values = torch.empty_like(rows, dtype=torch.int8)
    scales = rows.new_empty(len(rows))
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        exact = rows[part].double()
        least = (exact.abs().amax(1) / LARGEST).clamp(min=_SMALLEST_SCALE)
        near = least.to(SCALE_DTYPE)
        next_up = (near.view(torch.int16) + 1).view(SCALE_DTYPE)
        scales[part] = torch.where(near.double() < least, next_up, near)
        values[part] = (exact / scales[part].double().unsqueeze(1)).round()
    return values, scales


class Int8Rows:
    """Rows in int8 that read as float rows, as much of a tensor `[k, r]` as the search needs: a
    piece becomes float when it is asked for, in the precision of the scales `[k]`."""

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales
        self.shape, self.device, self.dtype = values.shape, values.device, scales.dtype

    def __len__(self) -> int:
        return len(self.values)

    @property
    def T(self) -> Tensor:
        """All rows as columns in float, `[r, k]`: a copy."""
        return self[:].T

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Some rows in float."""
        return self.values[rows].to(self.dtype).mul_(self.scales[rows].unsqueeze(-1))

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in float, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def double(self) -> Tensor:
        """All rows in float64."""
        return Int8Rows(self.values, self.scales.double())[:]


def float_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The float parameters with rows and columns and their names, sorted by name, so that nothing
    depends on the order in which a model makes them."""
    for name, parameter in sorted(model.named_parameters(), key=itemgetter(0)):
        if parameter.ndim > 1 and parameter.numel() and parameter.is_floating_point():
            yield name, parameter


def round_to_int8(matrix: Tensor) -> Tensor:
    """Round a matrix `[n, ...]` to whole numbers times a scale a row; gives the scales `[n]`."""
    return fill_from_int8(matrix, *quantized_rows(matrix.detach().flatten(1)))


@torch.no_grad()
def fill_from_int8(matrix: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Give a matrix what was kept of one; gives the scales as `round_to_int8` does."""
    rows = Int8Rows(values.flatten(1), scales.to(matrix.dtype))
    matrix.copy_(rows[:].view(matrix.shape))
    return rows.scales


@torch.no_grad()
def whole_numbers(matrix: Tensor, scales: Tensor | None) -> Tensor | None:
    """What a matrix `[n, ...]` was rounded to, in int8; None where it has been changed since, or
    never was rounded."""
    if scales is None:
        return None
    scales = scales.to(matrix.device)
    values = (matrix.flatten(1).double() / scales.double().unsqueeze(1)).round()
    values = values.clamp(-128, 127).to(torch.int8).view(matrix.shape)
    again = torch.empty_like(matrix)
    fill_from_int8(again, values, scales)
    return values if torch.equal(again, matrix) else None


def not_trained() -> CompressionError:
    """What is said where a model with rows in int8 is trained."""
    return CompressionError(
        "Expected a model in float to train, but its rows are in int8, which cannot take an "
        "optimizer's small steps; recover() trains such a model in float and brings it back to "
        "int8, or train first and quantize() afterwards."
    )
