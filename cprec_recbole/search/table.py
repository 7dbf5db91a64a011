"""What a search reads: each block's rows, and with an index groups of near ones with bounds.

A logit is `h . (W[g] P) = z . W[g]` with the query `z = P h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from cprec_recbole.config import CompressionError
from cprec_recbole.int8 import Int8Rows
from cprec_recbole.partition import PADDING, Partition

FEW_ITEMS = 2**15  # whose vectors may be kept
_MAX_RANK = 32  # above it bounds skip too little to be worth a copy of the rows
_MIN_ROWS = 2**14  # below it reading is quicker than looking at bounds
_GROUP_VALUES = 256  # numbers to a group: 64 rows of rank 4, 16 of rank 16
_BRANCH = 64  # groups to a branch
_NUMBERS = 2**19  # to work on at a time
_FEW_NUMBERS = 2**16  # the same where memory for them should stay in the cache
_LONGEST = 1e15
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Bounds:
    """What bounds the logits of all rows of each group."""

    ball: Tensor  # centre and radius, [G, r + 1]
    box: Tensor  # middle and half of the widths along each axis, [G, 2 r]
    size: int  # rows to a group
    n_whole: int  # groups with as many items

    @classmethod
    def of(cls, rows: Tensor, size: int, n_items: int) -> Bounds:
        """Bounds of runs of `size` rows, `[n, r]`, of which those from `n_items` on are copies."""
        rows = torch.cat([rows, rows[-1:].expand(-len(rows) % size, -1)])
        groups = rows.view(-1, size, rows.shape[1])
        centre = groups.mean(1)
        radius = (groups - centre.unsqueeze(1)).norm(dim=2).amax(1, keepdim=True)
        low, high = groups.amin(1), groups.amax(1)
        middle, half = (low + high) / 2, (high - low) / 2
        # wider by what rounding may do to the products
        error = (2 * rows.shape[1] + 8) * torch.finfo(rows.dtype).eps
        radius += error * (radius + centre.norm(dim=1, keepdim=True))
        half += error * (half + middle.abs())
        ball, box = torch.cat([centre, radius], 1), torch.cat([middle, half], 1)
        return cls(ball, box, size, n_items // size)

    def above(self, query: Tensor) -> Tensor:
        """A number that no logit of the group exceeds, `[r, B] -> [G, B]`: the smaller of
        `z . centre + |z| radius` and of the same for the box, with the absolute values of z."""
        length = torch.linalg.vector_norm(query, dim=0, keepdim=True)
        upper = self.ball @ torch.cat([query, length])
        return torch.minimum(upper, self.box @ torch.cat([query, query.abs()]), out=upper)

    def log_sum_below(self, query: Tensor) -> Tensor:
        """A number that the log of the summed exponentials of all rows is not below,
        `[r, B] -> [B]`. By Jensen a group of n rows sums to at least `n exp(z . centre)`."""
        mean = F.pad(self.ball[: self.n_whole, :-1] @ query, (0, 0, 0, 1), value=-1e30)
        peak = mean.amax(0)
        total = ((mean - peak) * _LOG2_E).exp2_().sum(0)
        return (peak + total.log()).double() + math.log(self.size)


@dataclass(frozen=True)
class Rows:
    """Rows of one block, or a copy of some of them."""

    values: Tensor | Int8Rows  # [n, r]
    basis: Tensor  # brings a hidden state into their space, [d, r], float64
    longest: float  # no item vector is longer
    start: int  # position of the block's first item
    n_items: int  # of the block; further rows are copies that fill up the last group
    # with an index: place in the block of each row, row of each place, bounds of groups and of runs
    # of groups
    order: Tensor | None = None
    row_at: Tensor | None = None
    bounds: tuple[Bounds, Bounds] | None = None
    # of a copy of some rows: all of them, and which they are, rising
    parent: Rows | None = None
    taken: Tensor | None = None

    @classmethod
    def of(
        cls, values: Tensor | Int8Rows, projection: Tensor | None, start: int, dtype: torch.dtype
    ) -> Rows:
        """All rows of a block but the padding row, not copied (but for half precision)."""
        skip = 1 if start == PADDING else 0
        if isinstance(values, Int8Rows):
            values = Int8Rows(values.values[skip:], values.scales[skip:].to(dtype))
        else:
            values = values[skip:].to(dtype)
        size = values.shape[1]
        basis = torch.eye(size, dtype=torch.float64, device=values.device)
        if projection is not None:
            basis = projection.detach().T.double().contiguous()
        parts = values.split(max(1, _FEW_NUMBERS // size))
        norms = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts)
        longest = float(torch.stack([norm.max() for norm in norms]).max())
        if not math.isfinite(longest) or not basis.isfinite().all():
            raise CompressionError(
                "Expected the weights of the item table to be finite numbers, but found NaN or "
                "infinity; the training diverged, or the checkpoint is damaged."
            )
        if longest > _LONGEST:
            raise CompressionError(
                f"Expected the rows of the item table to be shorter than {_LONGEST:.0e}, for their "
                f"squares to be numbers, but found a length of {longest:.1e}; the training "
                "diverged."
            )
        longest *= float(torch.linalg.matrix_norm(basis, 2))
        return cls(values, basis, longest, start + skip, len(values))

    def query(self, hidden: Tensor) -> Tensor:
        """Hidden states in the space of the rows and their precision, `[B, d] -> [r, B]`."""
        return (hidden @ self.basis).to(self.values.dtype).T.contiguous()

    def exact_query(self, hidden: Tensor) -> Tensor:
        """The same in float64, `[B, d] -> [B, r]`. No product of matrices, in which a result's last
        digit depends on how many there are."""
        if self.basis.shape[0] == self.basis.shape[1]:  # no projection
            return hidden
        parts = hidden.split(max(1, _NUMBERS // self.basis.numel()))
        return torch.cat([(self.basis * part.unsqueeze(2)).sum(1) for part in parts])

    def positions(self, rows: Tensor) -> Tensor:
        """Positions in popularity order of some rows, `[M] -> [M]`."""
        if self.parent is not None and self.taken is not None:
            return self.parent.positions(self.taken[rows])
        return self.start + (rows if self.order is None else self.order[rows])

    def find(self, positions: Tensor) -> Tensor:
        """Rows of some positions, -1 where they are not here, `[M] -> [M]`."""
        if self.parent is not None and self.taken is not None:
            rows = self.parent.find(positions)
            at = torch.searchsorted(self.taken, rows)
            return torch.where(F.pad(self.taken, (0, 1), value=-2)[at] == rows, at, -1)
        places = positions - self.start
        here = (places >= 0) & (places < self.n_items)
        rows = places if self.row_at is None else self.row_at[places.clamp(0, self.n_items - 1)]
        return torch.where(here, rows, -1)

    def pick(self, positions: Tensor) -> Rows:
        """A copy of some rows, given rising positions, also of other blocks."""
        rows = self.find(positions)
        rows = rows[rows >= 0]
        return replace(self, values=self.values[rows], parent=self, taken=rows)

    def of_groups(self, groups: Tensor, size: int) -> Rows:
        """A copy of the rows of some groups, rising, of an index."""
        rows = (groups.unsqueeze(1) * size + torch.arange(size, device=groups.device)).flatten()
        n_copies = max(0, int(rows[-1]) + 1 - self.n_items) if len(rows) else 0
        rows, values = rows[: len(rows) - n_copies], cast(Tensor, self.values)
        values = values.view(-1, size, values.shape[1])[groups].flatten(0, 1)[: len(rows)]
        return replace(self, values=values, parent=self, taken=rows)

    def indexed(self) -> Rows:
        """A copy of the rows in float, sorted into groups of near ones, with bounds; the rows
        themselves where bounds would not pay.

        It has coordinates in which rows are as long as their item vectors, so that bounds are not
        stretched by how training shared out the length between the factors. The axes are the rows'
        principal ones, along which boxes are tight.
        """
        if self.start == 1 or self.n_items < _MIN_ROWS or self.values.shape[1] > _MAX_RANK:
            return self
        orthonormal, triangular = torch.linalg.qr(self.basis)
        vectors = self.values.double() @ triangular.T
        centred = vectors - vectors.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
        moved = (vectors @ axes).to(self.values.dtype)
        order, size = sort_by_nearness(moved, _GROUP_VALUES // max(4, moved.shape[1]))
        values = moved[torch.cat([order, order[-1:].expand(-len(order) % size)])]
        groups, branches = (Bounds.of(values, n, self.n_items) for n in (size, size * _BRANCH))
        return replace(
            self,
            values=values,
            basis=orthonormal @ axes,
            order=order,
            row_at=order.argsort(),
            bounds=(groups, branches),
        )


def sort_by_nearness(rows: Tensor, most: int) -> tuple[Tensor, int]:
    """An order of rows in which runs of equal size hold near ones, `[n, r] -> [n]`, and that size.

    All rows are halved at the median of their principal direction, both halves likewise, down to
    runs of at most `most`.
    """
    n_rows = len(rows)
    depth = max(0, math.ceil(math.log2(n_rows / most)))
    size = -(-n_rows >> depth)
    order = torch.arange(size << depth, device=rows.device).clamp(max=n_rows).unsqueeze(0)
    padded = F.pad(rows, (0, 0, 0, 1))  # the row of zeros fills up, and always comes last
    for _ in range(depth):
        members, real = padded[order], (order < n_rows).unsqueeze(2)
        mean = members.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        members = (members - mean) * real
        scatter = members.transpose(1, 2) @ members
        direction = scatter.sum(2, keepdim=True)
        for _ in range(8):  # towards the eigenvector of the largest eigenvalue
            direction = scatter @ F.normalize(direction, dim=1)
        along = (members @ direction).masked_fill(~real, torch.inf).squeeze(2)
        order = order.gather(1, along.argsort(dim=1)).view(2 * len(order), -1)
    return order.flatten()[:n_rows], size


class SearchTable:
    """The weights of a softmax as a search reads them.

    Args:
        partition: which item is where.
        rows: those of each block, the head's with the padding row, `[k, r]`.
        projections: of each block, `[r, d]`; None where `r == d`.
        clusters: those of a tree, `[n_blocks - 1, d]`; None for a flat softmax.
        watched: the tensors that all of this is made from.
        is_indexed: whether to sort the rows of large tail blocks into groups with bounds.

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
        is_indexed: bool,
    ) -> None:
        self._watched, self._marks = list(watched), [_mark(tensor) for tensor in watched]
        self._storages = [tensor.detach() for tensor in watched]  # so that no address is used again
        self.partition, self.is_indexed = partition, is_indexed
        self.clusters = None if clusters is None else clusters.detach().double()
        self.dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
        self.blocks = [
            Rows.of(values, projection, start, self.dtype)
            for values, projection, start in zip(rows, projections, partition.starts)
        ]
        self.indexed = [block.indexed() if is_indexed else block for block in self.blocks]
        self.n_tail = partition.n_items - partition.cutoffs[0]
        self.longest = max(block.longest for block in self.blocks)  # item vector or cluster
        if self.clusters is not None and len(self.clusters):
            self.longest = max(self.longest, float(self.clusters.norm(dim=1).max()))
        # |error of z . w| <= r u |z| |w| for a product summed in any order (Higham, Accuracy and
        # Stability, section 3.1); the few more are for z, w and the score, which are rounded too.
        # Twice that may change between two logits, for hidden states of length one
        self.ranks = [block.values.shape[1] for block in self.blocks]
        self.rounding = torch.finfo(self.dtype).eps * (max(self.ranks) + 4) * self.longest
        self.joint_basis = torch.cat([block.basis for block in self.blocks], 1)  # [d, sum r]
        self._columns = [
            block.values.T.contiguous() if partition.n_items <= FEW_ITEMS else None
            for block in self.blocks
        ]
        self.item_at = partition.item_at
        self.vectors: Tensor | None = None  # of a small catalogue, [n_items, d], float64
        if partition.n_items <= FEW_ITEMS:
            self.item_at = self.item_at.long()
            vectors = [block.values.double() @ block.basis.T for block in self.blocks]
            self.vectors = F.pad(torch.cat(vectors), (0, 0, 1, 0))

    def is_current(self, watched: Sequence[Tensor]) -> bool:
        """Whether the weights are those that this was made from."""
        same = len(watched) == len(self._watched) and all(map(is_, watched, self._watched))
        return same and [_mark(tensor) for tensor in watched] == self._marks

    def columns(self) -> list[Tensor]:
        """Rows of each block as columns, `[r, n]`: a copy where there are few."""
        pairs = zip(self._columns, self.blocks)
        return [block.values.T if columns is None else columns for columns, block in pairs]

    def exact_logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits in float64, `[B, d], [B, m] -> [B, m]`, sums of products as in `exact_query`."""
        size = max(1, _FEW_NUMBERS // (positions.shape[1] * hidden.shape[1]))
        most = max(1, _NUMBERS // hidden.shape[1])
        if positions.shape[1] > most:  # where many items tie
            parts = positions.split(most, 1)
            return torch.cat([self.exact_logits(hidden, part) for part in parts], 1)
        if len(hidden) > size:
            pairs = zip(hidden.split(size), positions.split(size))
            return torch.cat([self.exact_logits(*pair) for pair in pairs])
        if self.vectors is not None:
            return (self.vectors[positions] * hidden.unsqueeze(1)).sum(2)
        queries = (self.joint_basis * hidden.unsqueeze(2)).sum(1, keepdim=True)
        blocks, logits = self.partition.blocks(positions), queries.new_zeros(())
        for j, (block, query) in enumerate(
            zip(self.blocks, queries.split_with_sizes(self.ranks, 2))
        ):
            codes = block.values[(positions - block.start).clamp(0, block.n_items - 1)]
            products = (codes * query).sum(2)  # in float64, which queries are in
            logits = torch.where(blocks == j, products, logits)
        return logits


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
