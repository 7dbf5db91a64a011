"""Rows of a block in int8, each with a scale of its own; made by `quantize`.

A row w is kept as whole numbers q from -127 to 127 and a scale s: `w = s q`, off by at most s / 2.
Scales are numbers of bfloat16's precision: eight bits times seven are exact in float32, so that
computations in float32 and float64 read the very same row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import Block

LARGEST = 127  # symmetric: -128 is not used
SCALE_DTYPE = torch.bfloat16  # as which scales are kept in a folder
BYTES_PER_SCALE = 2
_PIECE = 2**15  # rows that are turned into float, or from it, at a time
_NUMBERS = 2**18  # the same in numbers where they are multiplied: 1 MiB in float32
_SMALLEST_SCALE = 2.0**-126  # so that no product of a scale is below float32's normal numbers


def quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 rows and their scales, `[k, r] -> [k, r] int8, [k]`.

    The scale of a row is the smallest number of bfloat16 that brings its longest entry to 127 or
    below, so no entry is off by more than half of it.

    Args:
        rows: finite numbers, of float32 or float64.
    """
    values = torch.empty_like(rows, dtype=torch.int8)
    scales = rows.new_empty(len(rows))
    pieces = zip(rows.split(_PIECE), values.split(_PIECE), scales.split(_PIECE))
    for part, into, scale in pieces:
        exact = part.double()
        wanted = (exact.abs().amax(1) / LARGEST).clamp(min=_SMALLEST_SCALE)
        scale.copy_(_rounded_up(wanted))
        into.copy_((exact / scale.double().unsqueeze(1)).round())
    return values, scales


def _rounded_up(numbers: Tensor) -> Tensor:
    """The least number of bfloat16 that is not below each positive number."""
    near = numbers.to(SCALE_DTYPE)
    above = (near.view(torch.int16) + 1).view(SCALE_DTYPE)  # the next one up
    return torch.where(near.to(numbers.dtype) < numbers, above, near)


class Int8Rows:
    """Rows in int8 that read as float rows: a piece becomes float when it is asked for.

    As much of a tensor `[k, r]` as the search needs; nothing of it is kept in float.

    Args:
        values: `[k, r]`, int8.
        scales: `[k]`, in the precision that rows are read in.
    """

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        """`[k, r]`."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """The precision that rows are read in."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.values.device

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
        """All rows in float64: a copy."""
        return self.values.double().mul_(self.scales.double().unsqueeze(1))

    def multiply(self, start: int, end: int, factor: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows `start` to `end` times a matrix, `[r, B] -> [n, B]`: the whole numbers are
        multiplied and the products scaled, which are fewer where the batch is thin. A part at a
        time is in float, which stays in the cache."""
        if out is None:
            out = factor.new_empty(end - start, factor.shape[1])
        size = max(1, _NUMBERS // self.shape[1])
        for first in range(start, end, size):
            last = min(first + size, end)
            part = out[first - start : last - start]
            torch.mm(self.values[first:last].to(self.dtype), factor, out=part)
            part.mul_(self.scales[first:last].unsqueeze(1))
        return out


class Int8Block(Block):
    """A block whose rows are in int8; its projection stays in float.

    It is looked up, multiplied and searched as a Block is, and holds no gradient: whole numbers
    cannot take an optimizer's small steps.

    Args:
        size: items `k` in the block.
        rank: rank `r` of the block.
        dim: size `d` of an item vector.

    Attributes:
        weight: the rows as whole numbers, `[k, r]`, int8.
        scale: what a row is multiplied by, `[k]`.
    """

    def __init__(self, size: int, rank: int, dim: int) -> None:
        nn.Module.__init__(self)
        self.sparse = False
        values = torch.zeros(size, rank, dtype=torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(size), requires_grad=False)
        projection = torch.empty(rank, dim) if rank != dim else None
        self.projection = (
            None if projection is None else nn.Parameter(projection, requires_grad=False)
        )

    @classmethod
    def of(cls, block: Block) -> Int8Block:
        """A block's rows in int8, with a copy of its projection; the block is left as it was."""
        rank = block.weight.shape[1]
        dim = rank if block.projection is None else block.projection.shape[1]
        small = cls(0, rank, dim)
        small._take(*quantized_rows(block.weight.detach()))
        if block.projection is not None:
            small.projection = nn.Parameter(block.projection.detach().clone(), requires_grad=False)
        return small

    def in_float(self) -> Block:
        """A block with the same rows in float, to be trained; this one is left as it is."""
        rank = self.weight.shape[1]
        block = Block(0, rank, rank if self.projection is None else self.projection.shape[1])
        block.weight = nn.Parameter(self.whole())
        if self.projection is not None:
            block.projection = nn.Parameter(self.projection.detach().clone())
        return block

    @property
    def dtype(self) -> torch.dtype:
        """See Block.dtype."""
        return self.scale.dtype

    def rows(self) -> Int8Rows:
        """See Block.rows."""
        return Int8Rows(self.weight.detach(), self.scale.detach())

    def whole(self) -> Tensor:
        """See Block.whole: a copy in float."""
        return self.rows()[:]

    def per_row(self) -> list[nn.Parameter]:
        """See Block.per_row."""
        return [self.weight, self.scale]

    def learnt(self) -> Tensor:
        """See Block.learnt; always an error."""
        raise not_trained()

    def extend(self, rows: Tensor) -> None:
        """See Block.extend; the rows that are there keep their numbers."""
        values, scales = quantized_rows(rows.to(self.dtype))
        self._take(torch.cat([self.weight.detach(), values]), torch.cat([self.scale, scales]))

    def normal_(self, std: float) -> None:
        """Nothing: rows in int8 are made from others."""

    def cross_entropy(self, hidden: Tensor, rows: Tensor, memory: int) -> Tensor:
        """See Block.cross_entropy; always an error."""
        raise not_trained()

    def logits(self, hidden: Tensor) -> Tensor:
        """See Block.logits; rows become float a piece at a time."""
        codes = self.into_rank(hidden)
        return torch.cat([F.linear(codes, piece) for piece in self.rows().split(_PIECE)], dim=-1)

    def _embed(self, rows: Tensor, padding: int | None) -> Tensor:
        return self.rows()[rows]

    def _take(self, values: Tensor, scales: Tensor) -> None:
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scales.detach(), requires_grad=False)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, int8"


def not_trained() -> CompressionError:
    """What is said where a model with rows in int8 is trained."""
    return CompressionError(
        "Expected a model in float to train, but its rows are in int8, which cannot take an "
        "optimizer's small steps; recover() trains such a model in float and brings it back to "
        "int8, or train first and quantize() afterwards."
    )
