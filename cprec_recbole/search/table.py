"""What a search reads: each block's rows, and with an index their groups with bounds.

A logit is `h . (W[g] P) = z . W[g]` with the query `z = P h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from cprec_recbole.config import CompressionError
from cprec_recbole.int8.rows import Int8Rows
from cprec_recbole.partition import PADDING, Partition

FEW_ITEMS = 2**15  # a catalogue of so many is small
_MAX_RANK = 32  # above it bounds skip too little to be worth a copy of the rows
_MIN_ROWS = 2**14  # below it reading is quicker than looking at bounds
_GROUP_VALUES = 256  # numbers to a group: 64 rows of rank 4, 16 of rank 16
_BRANCH = 64  # groups to a branch
_INT8_PIECE = 2**12  # rows in int8 that are float at a time: 1 MiB at rank 64
_NUMBERS = 2**19  # to work on at a time
_LONGEST = 1e15
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Bounds:
    """What bounds the logits of all rows of each group: rows that lie close together have logits
    that lie close together.

    Attributes:
        ball: centre and radius, `[G, r + 1]`.
        box: middle and half of the widths along each axis, `[G, 2 r]`.
        size: rows to a group.
        n_whole: groups of `size` rows, all but perhaps the last.
    """

    ball: Tensor
    box: Tensor
    size: int
    n_whole: int

    @classmethod
    def of(cls, rows: Tensor, size: int, n_rows: int) -> Bounds:
        """Bounds of groups of rows, `[n, r]`; those from `n_rows` on are copies of others."""
        fill = rows[-1:].expand(-len(rows) % size, -1)
        groups = torch.cat([rows, fill]).view(-1, size, rows.shape[1])
        centres = groups.mean(1)
        radius = (groups - centres.unsqueeze(1)).norm(dim=2).amax(1, keepdim=True)
        low, high = groups.amin(1), groups.amax(1)
        middle, half = (low + high) / 2, (high - low) / 2
        # wider by what rounding may do to the products
        error = (2 * rows.shape[1] + 8) * torch.finfo(rows.dtype).eps
        radius += error * (radius + centres.norm(dim=1, keepdim=True))
        half += error * (half + middle.abs())
        ball, box = torch.cat([centres, radius], dim=1), torch.cat([middle, half], dim=1)
        return cls(ball, box, size, n_rows // size)

    def above(self, query: Tensor) -> Tensor:
        """A number that no logit of the group exceeds, `[r, B] -> [G, B]`: the smaller of
        `z . centre + |z| radius` and of the same for the box, with the absolute values of z."""
        length = torch.linalg.vector_norm(query, dim=0, keepdim=True)
        upper = self.ball @ torch.cat([query, length])
        return torch.minimum(upper, self.box @ torch.cat([query, query.abs()]), out=upper)

    def log_sum_below(self, query: Tensor) -> Tensor:
        """A number that the log of the summed exponentials of all rows is not below,
        `[r, B] -> [B]`. By Jensen a group of n rows sums to at least `n exp(z . centre)`."""
        if not self.n_whole:
            return query.new_full((query.shape[1],), -torch.inf).double()
        mean = self.ball[: self.n_whole, :-1] @ (query * _LOG2_E)
        peak = mean.amax(0)
        total = mean.sub_(peak).exp2_().sum(0).log2().double()
        return (peak.double() + total) / _LOG2_E + math.log(self.size)


@dataclass(frozen=True)
class Rows:
    """Rows of one block.

    Attributes:
        values: `[n, r]`.
        basis: brings a hidden state into their space, `[d, r]`, float64; None where `r == d`.
        longest: no item vector is longer.
        start: position of the block's first item.
        n_items: items of the rows; rows from there on are copies that fill up the last group.
        positions: position of each item; None where they follow each other.
        row_of: row of each position from `start` on, -1 where it is not here; None likewise.
        groups: bounds of groups of near rows; None without an index.
        branches: bounds of runs of such groups.
    """

    values: Tensor | Int8Rows
    basis: Tensor | None
    longest: float
    start: int
    n_items: int
    positions: Tensor | None = None
    row_of: Tensor | None = None
    groups: Bounds | None = None
    branches: Bounds | None = None

    def full_basis(self) -> Tensor:
        """The basis, also where it is the identity."""
        if self.basis is not None:
            return self.basis
        size = self.values.shape[1]
        return torch.eye(size, dtype=torch.float64, device=self.values.device)

    def query(self, hidden: Tensor) -> Tensor:
        """Hidden states in the space of the rows, `[B, d] -> [B, r]`, in float64. No product of
        matrices, in which a result's last digit depends on how many there are."""
        if self.basis is None:
            return hidden
        parts = hidden.split(max(1, _NUMBERS // self.basis.numel()))
        return torch.cat([(self.basis * part.unsqueeze(2)).sum(1) for part in parts])

    def positions_of(self, rows: Tensor) -> Tensor:
        """Positions in popularity order, `[M] -> [M]`."""
        return rows + self.start if self.positions is None else self.positions[rows]

    def find(self, positions: Tensor) -> Tensor:
        """Rows of positions, -1 where they are not here, `[M] -> [M]`."""
        size = self.n_items if self.row_of is None else len(self.row_of)
        rows = positions - self.start
        rows = torch.where((rows >= 0) & (rows < size), rows, -1)
        if self.row_of is None:
            return rows
        return torch.where(rows >= 0, self.row_of[rows.clamp(min=0)], -1)

    def pick(self, positions: Tensor) -> Rows:
        """A copy of some rows, given rising positions, also of other blocks."""
        rows = self.find(positions)
        rows = rows[rows >= 0]
        row_of = torch.full((self.n_items,), -1, device=rows.device)
        row_of[rows] = torch.arange(len(rows), device=rows.device)
        return replace(
            self,
            values=self.values[rows],
            n_items=len(rows),
            positions=rows + self.start,
            row_of=row_of,
        )

    def grouped(self) -> Rows:
        """A copy of the rows in float, sorted into groups of near ones, with bounds.

        Rows are brought into coordinates in which they are as long as their item vectors, so that
        bounds are not stretched by how training shared out the length between the factors. The
        axes are the rows' principal ones, along which boxes are tight.
        """
        orthonormal, triangular = torch.linalg.qr(self.full_basis())
        vectors = self.values.double() @ triangular.T
        centred = vectors - vectors.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
        moved = (vectors @ axes).to(self.values.dtype)
        size = _GROUP_VALUES // max(4, moved.shape[1])
        order = sort_by_nearness(moved, size)
        row_of = torch.empty_like(order)
        row_of[order] = torch.arange(len(order), device=order.device)
        rows = moved[torch.cat([order, order[-1:].expand(-len(order) % size)])]
        return replace(
            self,
            values=rows,
            basis=orthonormal @ axes,
            positions=order + self.start,
            row_of=row_of,
            groups=Bounds.of(rows, size, self.n_items),
            branches=Bounds.of(rows, size * _BRANCH, self.n_items),
        )


def sort_by_nearness(rows: Tensor, size: int) -> Tensor:
    """An order in which each run of about `size` rows is of near ones, `[n, r] -> [n]`.

    All rows are halved by their place along their principal direction, both halves likewise, and so
    on: a balanced tree, whose leaves have at most `size` rows.
    """
    n_rows, rank = rows.shape
    depth = max(0, math.ceil(math.log2(n_rows / size)))
    order = torch.arange(size << depth, device=rows.device).clamp(max=n_rows).unsqueeze(0)
    padded = torch.cat([rows, rows.new_zeros(1, rank)])  # the last is no row: it comes last
    for _ in range(depth):
        members, real = padded[order], (order < n_rows).unsqueeze(2)
        mean = members.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        members = (members - mean) * real
        direction = _principal_direction(members.transpose(1, 2) @ members)
        place = (members @ direction).masked_fill(~real, torch.inf).squeeze(2)
        order = order.gather(1, place.argsort(dim=1)).view(2 * len(order), -1)
    return order.flatten()[:n_rows]


def _principal_direction(scatter: Tensor) -> Tensor:
    """About the eigenvector of the largest eigenvalue, by power iteration, `[m, r, r] ->
    [m, r, 1]`. Any direction makes groups."""
    longest = torch.diagonal(scatter, dim1=1, dim2=2).argmax(1)
    direction = scatter[torch.arange(len(scatter), device=scatter.device), :, longest].unsqueeze(2)
    for _ in range(8):
        direction = scatter @ F.normalize(direction, dim=1)
    return direction


def whole_block(
    values: Tensor | Int8Rows,
    projection: Tensor | None,
    start: int,
    dtype: torch.dtype,
) -> Rows:
    """A block's own rows, not copied (but for half precision); the padding row left out.

    Raises:
        CompressionError: weights that are not finite numbers.
    """
    skip = 1 if start == PADDING else 0
    if isinstance(values, Int8Rows):
        values = Int8Rows(values.values[skip:], values.scales[skip:].to(dtype))
    else:
        values = values[skip:].to(dtype)
    basis = None if projection is None else projection.detach().T.double().contiguous()
    pieces = values.split(_INT8_PIECE) if isinstance(values, Int8Rows) else [values]
    norms = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in pieces)
    longest = float(torch.stack([part.max() for part in norms]).max())
    if not math.isfinite(longest) or not (basis is None or basis.isfinite().all()):
        raise CompressionError(
            "Expected the weights of the item table to be finite numbers, but found NaN or "
            "infinity; the training diverged, or the checkpoint is damaged."
        )
    if longest > _LONGEST:
        raise CompressionError(
            f"Expected the rows of the item table to be shorter than {_LONGEST:.0e}, for their "
            f"squares to be numbers, but found a length of {longest:.1e}; the training diverged."
        )
    spread = 1.0 if basis is None else float(torch.linalg.matrix_norm(basis, 2))
    return Rows(values, basis, longest * spread, start + skip, len(values))


class SearchTable:
    """Weights of a softmax as a search reads them, and how to tell that they have changed since.

    Args:
        partition: which item is where.
        rows: those of each block, the head's with the padding row, `[k, r]`.
        projections: of each block, `[r, d]`; None where `r == d`.
        clusters: those of a tree, `[n_blocks - 1, d]`; None for a flat softmax.
        watched: the tensors that all of this is made from.
        indexed: whether to sort the rows of large tail blocks into groups with bounds.

    Attributes:
        dtype: the precision of the first pass, and of scores.
        blocks: the blocks as they are.
        indexed: the same, with groups where there is an index.
        longest: no item vector and no cluster is longer.
        rounding: twice what rounding may change in a logit of the first pass, for hidden states of
            length one.
        vectors: of a small catalogue the item vectors, `[n_items - 1, d]`, float64; else None.

    Raises:
        CompressionError: weights that are not finite numbers.
    """

    def __init__(
        self,
        partition: Partition,
        rows: Sequence[Tensor | Int8Rows],
        projections: Sequence[Tensor | None],
        clusters: Tensor | None,
        watched: Sequence[Tensor],
        indexed: bool,
    ) -> None:
        self._marks = [(tensor, *_mark(tensor)) for tensor in watched]
        self._storages = [tensor.detach() for tensor in watched]  # so that no address is used again
        self.is_indexed, self.partition = indexed, partition
        self.clusters = None if clusters is None else clusters.detach().double()
        self.dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
        self.blocks = [
            whole_block(values, projection, start, self.dtype)
            for values, projection, start in zip(rows, projections, partition.starts)
        ]
        self.indexed = [
            block.grouped() if indexed and _is_worth_it(block) else block for block in self.blocks
        ]
        self.longest = max(block.longest for block in self.blocks)
        if self.clusters is not None and len(self.clusters):
            self.longest = max(self.longest, float(self.clusters.norm(dim=1).max()))
        # |error of z . w| <= r u |z| |w| for a product summed in any order (Higham, Accuracy and
        # Stability, section 3.1); the few more are for z, w and the score, which are rounded too
        unit = torch.finfo(self.dtype).eps / 2
        both = [*self.blocks, *self.indexed]
        self.rounding = 2 * unit * max((b.values.shape[1] + 4) * b.longest for b in both)
        self.vectors = None
        if partition.n_items <= FEW_ITEMS:
            self.vectors = torch.cat(
                [block.values.double() @ block.full_basis().T for block in self.blocks]
            )

    def is_current(self, watched: Sequence[Tensor]) -> bool:
        """Whether the weights are those that this was made from."""
        return len(watched) == len(self._marks) and all(
            tensor is then and _mark(tensor) == (address, version)
            for tensor, (then, address, version) in zip(watched, self._marks)
        )

    @cached_property
    def items(self) -> Tensor:
        """Item ids in popularity order without padding, `[n_items - 1]`."""
        return self.partition.item_at[1:].long()

    @cached_property
    def columns(self) -> list[Tensor]:
        """Rows of each block as columns, `[r, n]`: a copy, for single queries."""
        return [block.values.T.contiguous() for block in self.blocks]

    @cached_property
    def joint_basis(self) -> tuple[Tensor, list[int]]:
        """The bases of all blocks beside each other, `[d, sum r]`, and their ranks."""
        bases = [block.full_basis() for block in self.blocks]
        return torch.cat(bases, 1), [basis.shape[1] for basis in bases]


def _is_worth_it(block: Rows) -> bool:
    is_tail = block.start > 1
    return is_tail and block.n_items >= _MIN_ROWS and block.values.shape[1] <= _MAX_RANK


def _mark(tensor: Tensor) -> tuple[int, int]:
    """What changes with a tensor's numbers: where they lie, and PyTorch's count of changes."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _count_fused_step(optimizer: Optimizer, *_: Any) -> None:
    """Count a fused step among the changes of its parameters, which PyTorch does not."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                increment_version(parameter)


register_optimizer_step_post_hook(_count_fused_step)
