"""Rows and matrices of whole numbers, in int8 or int4, times scales; `mixed` is rows in int4 and
other matrices in int8.

In int8 each row has a scale of its own. In int4 numbers are from -7 to 7, two to a byte, and a
block has a scale for each *column*: one for each row would take as much as four numbers. Matrices
of other parts have a scale for each row in both.

Scales are numbers of bfloat16: eight bits times seven are exact in float32, so that float32 and
float64 read the very same row. Rows are so in memory too; other matrices, which are small, in the
folder alone: in memory they hold the very products in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from cprec_recbole.config import CompressionError

LARGEST = 127  # symmetric: -128 is not used
LARGEST_OF_INT4 = 7
SCALE_DTYPE = torch.bfloat16  # as which scales are kept in a folder
BYTES_PER_SCALE = 2
ROWS_AT_A_TIME = 2**15  # that are turned into float, or from it
_SMALLEST_SCALE = 2.0**-126  # so that no product of a scale is below float32's normal numbers
# Shares of the largest number that four bits may reach: the best is found by trying. Below, of
# normally distributed numbers, the many that are cut cost more than finer steps bring
_REACHES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_TRIED_NUMBERS = 2**16  # for a scale, so that a large block takes no longer


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


def int4_scales(matrix: Tensor, dim: int) -> Tensor:
    """The scales of least squared error for the rows or columns of a finite matrix in int4, numbers
    of bfloat16: `dim=1` a scale for each row, `[n, m] -> [n, 1]`, `dim=0` for each column,
    `[n, m] -> [1, m]`, by some of the rows where there are many."""
    if dim == 0:  # evenly spread over all
        matrix = matrix[:: max(1, matrix.numel() // _TRIED_NUMBERS)]
    largest = matrix.abs().amax(dim, keepdim=True) / LARGEST_OF_INT4
    tried = [(largest * reach).clamp(min=_SMALLEST_SCALE).to(SCALE_DTYPE) for reach in _REACHES]
    scales = torch.stack(tried).to(matrix.dtype)
    errors = [(of_int4(matrix, s) * s - matrix).square_().sum(dim, keepdim=True) for s in scales]
    return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True)).squeeze(0)


def of_int4(matrix: Tensor, scales: Tensor) -> Tensor:
    """The nearest whole numbers from -7 to 7 of a matrix over its scales, still in float."""
    return (matrix / scales).round_().clamp_(-LARGEST_OF_INT4, LARGEST_OF_INT4)


def packed(numbers: Tensor) -> Tensor:
    """Numbers from -8 to 7 as halves of bytes, the first in the lower one, `[n, r] int8 ->
    [n, ceil(r / 2)] uint8`; an odd row ends with a zero."""
    halves = nn.functional.pad(numbers, (0, numbers.shape[1] % 2)).add(8).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4


def unpacked(bytes_: Tensor, size: int) -> Tensor:
    """What was packed, of rows of that size, `[..., ceil(r / 2)] uint8 -> [..., r] float32`."""
    whole = bytes_.to(torch.float32)
    upper = (whole / 16).floor()  # exporters know too little of shifts
    return torch.stack([whole - 16 * upper, upper], -1).flatten(-2)[..., :size] - 8


class Int8Rows:
    """Rows in int8 that read as float rows, as much of a tensor `[k, r]` as the search needs: a
    piece becomes float when it is asked for, in the precision of the scales `[k]`."""

    dtype_name = "int8"

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales
        self.device, self.dtype = values.device, scales.dtype

    @classmethod
    def of(cls, rows: Tensor) -> Int8Rows:
        """The nearest to finite rows in float32 or float64."""
        return cls(*quantized_rows(rows))

    @property
    def shape(self) -> torch.Size:
        """Rows and rank."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    @property
    def T(self) -> Tensor:
        """All rows as columns in float, `[r, k]`: a copy."""
        return self[:].T

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Some rows in float."""
        return self.numbers(rows).to(self.dtype).mul_(self.scales_of(rows))

    def numbers(self, rows: Tensor | slice) -> Tensor:
        """The whole numbers of some rows."""
        return self.values[rows]

    def scales_of(self, rows: Tensor | slice) -> Tensor:
        """What brings the numbers of some rows to their length."""
        return self.scales[rows].unsqueeze(-1)

    def pick(self, rows: Tensor | slice) -> Int8Rows:
        """Some rows as they are."""
        return type(self)(self.values[rows], self.scales[rows])

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in float, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, dtype: torch.dtype) -> Int8Rows:
        """The same rows that read in another precision."""
        return type(self)(self.values, self.scales.to(dtype))

    def double(self) -> Tensor:
        """All rows in float64."""
        return self.to(torch.float64)[:]

    def with_more(self, rows: Tensor) -> Int8Rows:
        """These rows, and the nearest to others in float after them."""
        more = self.of(rows.to(self.dtype))
        pairs = (self.values, more.values), (self.scales, more.scales)
        return Int8Rows(*(torch.cat(pair) for pair in pairs))


class Int4Rows(Int8Rows):
    """Rows in int4, `[k, ceil(r / 2)]` bytes and a scale for each column, `[r]`."""

    dtype_name = "int4"

    @classmethod
    def of(cls, rows: Tensor) -> Int4Rows:
        """See Int8Rows.of; an entry beyond seven scales is cut to them."""
        none = torch.zeros(0, -(-rows.shape[1] // 2), dtype=torch.uint8, device=rows.device)
        return cls(none, int4_scales(rows, 0)[0]).with_more(rows)

    @property
    def shape(self) -> torch.Size:
        """See Int8Rows.shape."""
        return torch.Size([len(self.values), len(self.scales)])

    def numbers(self, rows: Tensor | slice) -> Tensor:
        """See Int8Rows.numbers."""
        return unpacked(self.values[rows], len(self.scales))

    def scales_of(self, rows: Tensor | slice) -> Tensor:
        """See Int8Rows.scales_of."""
        return self.scales

    def pick(self, rows: Tensor | slice) -> Int4Rows:
        """See Int8Rows.pick."""
        return Int4Rows(self.values[rows], self.scales)

    def with_more(self, rows: Tensor) -> Int4Rows:
        """See Int8Rows.with_more; all have the scales that are there."""
        parts = (of_int4(part, self.scales) for part in rows.to(self.dtype).split(ROWS_AT_A_TIME))
        more = (packed(part.to(torch.int8)) for part in parts)
        return Int4Rows(torch.cat([self.values, *more]), self.scales)


ROWS_OF: dict[str, type[Int8Rows]] = {"int8": Int8Rows, "int4": Int4Rows}


def dtypes_of(dtype: str) -> tuple[str, str]:
    """In which dtype rows of blocks are, and other matrices."""
    return ("int4", "int8") if dtype == "mixed" else (dtype, dtype)


def float_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The float parameters with rows and columns and their names, sorted by name, so that nothing
    depends on the order in which a model makes them."""
    for name, parameter in sorted(model.named_parameters(), key=itemgetter(0)):
        if parameter.ndim > 1 and parameter.numel() and parameter.is_floating_point():
            yield name, parameter


def round_matrix(matrix: Tensor, dtype: str) -> Tensor:
    """Round a matrix `[n, ...]` to whole numbers times a scale a row; gives the scales `[n]`."""
    rows = matrix.detach().flatten(1)
    if dtype == "int8":
        return fill(matrix, *quantized_rows(rows))
    scales = int4_scales(rows, 1)
    return fill(matrix, of_int4(rows, scales).to(torch.int8), scales[:, 0])


@torch.no_grad()
def fill(matrix: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Give a matrix what was kept of one, whole numbers in int8 or packed; gives the scales as
    `round_matrix` does."""
    if values.dtype == torch.uint8:
        values = unpacked(values, matrix[0].numel()).to(torch.int8)
    rows = Int8Rows(values.flatten(1), scales.to(matrix.dtype))
    matrix.copy_(rows[:].view(matrix.shape))
    return rows.scales


@torch.no_grad()
def whole_numbers(matrix: Tensor, scales: Tensor | None, dtype: str | None) -> Tensor | None:
    """What a matrix `[n, ...]` was rounded to, in int8, or packed for int4, `[n, ceil(m / 2)]`;
    None where it has been changed since, or never was rounded."""
    if scales is None:
        return None
    scales = scales.to(matrix.device)
    values = (matrix.flatten(1).double() / scales.double().unsqueeze(1)).round()
    largest = LARGEST_OF_INT4 if dtype == "int4" else LARGEST
    values = values.clamp(-largest, largest).to(torch.int8)
    again = torch.empty_like(matrix)
    fill(again, values, scales)
    if not torch.equal(again, matrix):
        return None
    return packed(values) if dtype == "int4" else values.view(matrix.shape)


@contextmanager
def rounded(model: nn.Module, dtype: str, tables: set[int]) -> Iterator[None]:
    """Within: the matrices of a model in float are rounded as `quantize` does, those whose `id` is
    in `tables` as rows of a block; afterwards they are as before. A gradient that is computed
    within is the straight-through estimate (Bengio et al., arXiv 1308.3432, section 3)."""
    before = [(matrix, matrix.detach().clone()) for _, matrix in float_matrices(model)]
    try:
        with torch.no_grad():
            of_rows, of_others = dtypes_of(dtype)
            for matrix, _ in before:
                if (of_rows if id(matrix) in tables else of_others) == "int8":
                    round_matrix(matrix, "int8")
                else:
                    rows = matrix.flatten(1)
                    scales = int4_scales(rows, 0 if id(matrix) in tables else 1)
                    matrix.copy_(of_int4(rows, scales).mul_(scales).view(matrix.shape))
        yield
    finally:
        with torch.no_grad():
            for matrix, values in before:
                matrix.copy_(values)


def not_trained(dtype: Any) -> CompressionError:
    """What is said where a model with rows in a dtype of whole numbers is trained."""
    return CompressionError(
        f"Expected a model in float to train, but its rows are in {dtype}, which cannot take an "
        f"optimizer's small steps; recover() trains such a model in float and brings it back to "
        f"{dtype}, or train first and quantize() afterwards."
    )
