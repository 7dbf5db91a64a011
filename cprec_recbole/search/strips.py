"""What the search reads: each block's rows, plain or sorted into groups with bounds.

A logit is `h . (W[g] P) = z . W[g]` with the query `z = P h`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import Block
from cprec_recbole.int8 import Int8Rows
from cprec_recbole.partition import PADDING
from cprec_recbole.search.bounds import Bounds, group_rows

_GROUP_VALUES = 256  # numbers to a group: 64 rows of rank 4, 16 of rank 16
_BRANCH = 64  # groups to a branch of their tree
_FEW_ROWS = 2**15
_PIECE = 2**12  # rows in int8 that are float at a time: 1 MiB at rank 64
_LONGEST = 1e15


class Strip(ABC):
    """Rows that the search reads, in one space.

    Attributes:
        codes: the rows, `[N, r]`, as they are kept.
        basis: brings a hidden state into the space of the rows, `[d, r]`, float64.
        rounding: what rounding may change in a logit, for hidden states of length one, if queries
            are computed in float64.
        joint_rounding: the same if they are computed in the model's precision.
        n_items: how many items the rows stand for.
        keep_columns: whether memory may be spent on reading all rows for one query sooner.
    """

    keep_columns = False

    def __init__(self, codes: Tensor | Int8Rows, basis: Tensor, longest: float) -> None:
        self.codes = codes
        self.basis = basis
        self.n_items = len(codes)
        # |error of z . w| <= r u |z| |w| for a product summed in any order (Higham, Accuracy and
        # Stability, section 3.1); the few more are for z and w, which are rounded themselves
        unit = torch.finfo(codes.dtype).eps / 2
        dim, rank = basis.shape
        spread = float(torch.linalg.matrix_norm(basis, 2))
        self.rounding = (rank + 4) * unit * longest * spread
        self.joint_rounding = self.rounding + dim * unit * longest * float(basis.norm())

    def query(self, hidden: Tensor) -> Tensor:
        """Hidden states in the space of the rows, `[B, d] -> [B, r]`; hidden in float64."""
        return (hidden @ self.basis).to(self.codes.dtype)

    def factor(self, query: Tensor) -> Tensor:
        """What the rows are multiplied by, `[r, B] -> [r, B]`."""
        return query

    @property
    def columns(self) -> Tensor:
        """The rows as columns, `[r, N]`: a copy, by which few queries are multiplied sooner, if
        there are few rows or `keep_columns` is set."""
        copied = self.keep_columns or len(self.codes) <= _FEW_ROWS
        return self._copied_columns if copied else self.codes.T

    @cached_property
    def _copied_columns(self) -> Tensor:
        return self.codes.T.contiguous()

    def multiply(self, start: int, end: int, factor: Tensor, out: Tensor) -> Tensor:
        """Rows `start` to `end` times what `factor` gave, `[r, B] -> [n, B]`."""
        if isinstance(self.codes, Int8Rows):
            return self.codes.multiply(start, end, factor, out)
        return torch.mm(self.codes[start:end], factor, out=out)

    @abstractmethod
    def positions(self, rows: Tensor) -> Tensor:
        """Positions in popularity order of some rows, `[...] -> [...]`."""

    @abstractmethod
    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some positions are in here, and their rows, `[M] -> [M] bool, [M']`."""


class PlainStrip(Strip):
    """A block's own rows, not copied (but for half precision); the padding row left out. Rows in
    int8 stay so.

    Args:
        block: the factors.
        start: position of the block's first row.
        dtype: float32 or float64, in which logits are computed.

    Raises:
        CompressionError: weights that are not finite numbers.
    """

    def __init__(self, block: Block, start: int, dtype: torch.dtype) -> None:
        skip = 1 if start == PADDING else 0
        rows = block.rows()
        if isinstance(rows, Int8Rows):
            codes: Tensor | Int8Rows = Int8Rows(rows.values[skip:], rows.scales[skip:].to(dtype))
        else:
            codes = rows[skip:].to(dtype)
        super().__init__(codes, _basis(block), _longest(codes, block))
        self.start = start + skip

    def positions(self, rows: Tensor) -> Tensor:
        """See Strip.positions."""
        return rows + self.start

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See Strip.find."""
        inside = self.holds(positions)
        return inside, positions[inside] - self.start

    def holds(self, positions: Tensor) -> Tensor:
        """Which of some positions are in here, `[...] -> [...]`."""
        return (positions >= self.start) & (positions < self.start + self.n_items)


class PickedStrip(Strip):
    """Some rows of a plain strip, copied; for searches in a part of the catalogue.

    Args:
        whole: the strip to pick from.
        positions: which, sorted, each once, `[m]`; those of other blocks are passed over.
    """

    def __init__(self, whole: PlainStrip, positions: Tensor) -> None:
        inside, rows = whole.find(positions)
        super().__init__(whole.codes[rows], whole.basis, 0.0)
        self.rounding, self.joint_rounding = whole.rounding, whole.joint_rounding
        self._positions = positions[inside]

    def positions(self, rows: Tensor) -> Tensor:
        """See Strip.positions."""
        return self._positions[rows]

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See Strip.find."""
        if not self.n_items:
            return torch.zeros_like(positions, dtype=torch.bool), positions[:0]
        at = torch.searchsorted(self._positions, positions).clamp(max=self.n_items - 1)
        inside = self._positions[at] == positions
        return inside, at[inside]


class GroupedStrip(Strip):
    """A copy of a block's rows, sorted into groups of near ones, with bounds for each group.

    Rows have one more column: 0, or -inf where a row only fills up its group. A query has a one
    there, so that such a row's logit is -inf.

    Attributes:
        codes: the rows, `[G s, r + 1]`, in float whatever they were made from.
        group: rows to a group.
        bounds: of the groups.
        branches: bounds of branches of the tree that the groups are the leaves of.
    """

    codes: Tensor

    def __init__(self, whole: PlainStrip) -> None:
        axes, basis = _principal_axes(whole.codes, whole.basis)
        dtype = whole.codes.dtype
        moved = (whole.codes.double() @ axes).to(dtype)
        order, real = group_rows(moved, _GROUP_VALUES // max(4, moved.shape[1]))
        rows = moved[order]
        filler = torch.where(real, 0.0, -torch.inf).to(dtype)
        codes = torch.cat([rows, filler.unsqueeze(2)], dim=2).flatten(0, 1)
        super().__init__(codes, basis, float(rows.norm(dim=2).max()))
        self.n_items = whole.n_items
        self.group = order.shape[1]
        self.bounds = Bounds.of(rows, real)
        n_branches = max(1, len(order) // _BRANCH)  # both are powers of two
        branches = rows.view(n_branches, -1, rows.shape[2])
        self.branches = Bounds.of(branches, real.view(n_branches, -1))
        self._start = whole.start
        slots = torch.arange(order.numel(), device=codes.device, dtype=torch.int32)
        self._row_of = torch.empty(self.n_items, dtype=torch.int32, device=codes.device)
        self._row_of[order[real]] = slots.view(order.shape)[real]
        own = torch.where(real, order + whole.start, PADDING)
        self._positions = own.flatten().to(torch.int32)

    def members(self, groups: Tensor) -> Tensor:
        """The rows of some groups, `[G] -> [G, s, r + 1]`."""
        return self.codes.view(-1, self.group, self.codes.shape[1])[groups]

    def factor(self, query: Tensor) -> Tensor:
        """As Strip.factor, with a last row of ones, `[r, B] -> [r + 1, B]`."""
        return torch.cat([query, query.new_ones(1, query.shape[1])])

    def positions(self, rows: Tensor) -> Tensor:
        """See Strip.positions; 0, the padding item, for a row that only fills up."""
        return self._positions[rows].long()

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See Strip.find."""
        inside = (positions >= self._start) & (positions < self._start + self.n_items)
        return inside, self._row_of[positions[inside] - self._start].long()


def _basis(block: Block) -> Tensor:
    if block.projection is None:
        size = block.weight.shape[1]
        return torch.eye(size, dtype=torch.float64, device=block.weight.device)
    return block.projection.detach().T.double()


def _principal_axes(codes: Tensor | Int8Rows, basis: Tensor) -> tuple[Tensor, Tensor]:
    """A change of coordinates, `[r, r]`, and the basis that goes with it, `[d, r]`.

    In the new coordinates a row is as long as its item vector, so that bounds are not stretched by
    how training shared out the length between the factors, and the axes are the rows' principal
    ones, along which boxes are tight.
    """
    orthonormal, triangular = torch.linalg.qr(basis)
    vectors = codes.double() @ triangular.T
    centred = vectors - vectors.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    return triangular.T @ axes, orthonormal @ axes


def _longest(codes: Tensor | Int8Rows, block: Block) -> float:
    pieces = codes.split(_PIECE) if isinstance(codes, Int8Rows) else [codes]
    norms = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in pieces)
    longest = float(torch.stack([part.max() for part in norms]).max()) if len(codes) else 0.0
    projection = block.projection
    if not math.isfinite(longest) or not (projection is None or projection.isfinite().all()):
        raise CompressionError(
            "Expected the weights of the item table to be finite numbers, but found NaN or "
            "infinity; the training diverged, or the checkpoint is damaged."
        )
    if longest > _LONGEST:
        raise CompressionError(
            f"Expected the rows of the item table to be shorter than {_LONGEST:.0e}, for their "
            f"squares to be numbers, but found a length of {longest:.1e}; the training diverged."
        )
    return longest
