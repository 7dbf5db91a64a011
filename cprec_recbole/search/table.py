"""What a search reads: each block's rows.

A logit is `h . (W[g] P) = z . W[g]` with the query `z = P h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.integers import Int4Rows, Int8Rows
from cprec_recbole.partition import PADDING, Partition
from cprec_recbole.versions import Version

_NUMBERS = 2**19  # to work on at a time
_FEW_NUMBERS = 2**16  # the same where memory for them should stay in the cache
_LONGEST = 1e15


@dataclass(frozen=True)
class Rows:
    """Rows of one block, or a copy of some of them."""

    values: Tensor | Int8Rows  # [n, r]
    basis: Tensor  # brings a hidden state into their space, [d, r], float64
    longest: float  # no item vector is longer
    start: int  # position of the block's first item
    is_plain: bool  # whether that is the space of hidden states
    places: Tensor | None = None  # positions of a copy of some of the rows, rising

    @classmethod
    def of(
        cls, values: Tensor | Int8Rows, projection: Tensor | None, start: int, dtype: torch.dtype
    ) -> Rows:
        """All rows of a block but the padding row, not copied (but for half precision)."""
        skip = 1 if start == PADDING else 0
        own = slice(skip, None)
        values = (values.pick(own) if isinstance(values, Int8Rows) else values[own]).to(dtype)
        size = values.shape[1]
        basis = torch.eye(size, dtype=torch.float64, device=values.device)
        if projection is not None:
            basis = projection.detach().T.double().contiguous()
        if isinstance(values, Int4Rows):  # the scales of columns are those of queries as well
            basis = basis * values.scales.double()
            values = Int4Rows(values.values, torch.ones_like(values.scales))
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
        is_plain = projection is None and not isinstance(values, Int4Rows)
        return cls(values, basis, longest, start + skip, is_plain)

    def exact_query(self, hidden: Tensor) -> Tensor:
        """Hidden states in the space of the rows, `[B, d] -> [B, r]`, in float64. No product of
        matrices, in which a result's last digit depends on how many there are."""
        if self.is_plain:
            return hidden
        parts = hidden.split(max(1, _NUMBERS // self.basis.numel()))
        return torch.cat([(self.basis * part.unsqueeze(2)).sum(1) for part in parts])

    def positions(self, rows: Tensor) -> Tensor:
        """Positions in popularity order of some rows, `[M] -> [M]`."""
        return self.start + rows if self.places is None else self.places[rows]

    def find(self, positions: Tensor) -> Tensor:
        """Rows of some positions, -1 where they are not here, `[M] -> [M]`."""
        if self.places is None:
            rows = positions - self.start
            return torch.where((rows >= 0) & (rows < len(self.values)), rows, -1)
        rows = torch.searchsorted(self.places, positions)
        return torch.where(F.pad(self.places, (0, 1), value=-1)[rows] == positions, rows, -1)

    def pick(self, positions: Tensor) -> Rows:
        """A copy of some rows, given rising positions, also of other blocks."""
        rows = self.find(positions)
        rows = rows[rows >= 0]
        return replace(self, values=self.values[rows], places=self.start + rows)


class SearchTable:
    """The weights of a softmax as a search reads them.

    Args:
        partition: which item is where.
        rows: those of each block, the head's with the padding row, `[k, r]`.
        projections: of each block, `[r, d]`; None where `r == d`.
        clusters: those of a tree, `[n_blocks - 1, d]`; None for a flat softmax.
        version: of what all of this is made from.
    """

    def __init__(
        self,
        partition: Partition,
        rows: Sequence[Tensor | Int8Rows],
        projections: Sequence[Tensor | None],
        clusters: Tensor | None,
        version: Version,
    ) -> None:
        self.version = version
        self.partition = partition
        self.clusters = None if clusters is None else clusters.detach().double()
        self.dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
        self.blocks = [
            Rows.of(values, projection, start, self.dtype)
            for values, projection, start in zip(rows, projections, partition.starts)
        ]
        self.n_tail = partition.n_items - partition.cutoffs[0]
        self.longest = max(block.longest for block in self.blocks)  # item vector or cluster
        if self.clusters is not None and len(self.clusters):
            self.longest = max(self.longest, float(self.clusters.norm(dim=1).max()))
        # |error of z . w| <= r u |z| |w| for a product summed in any order (Higham, Accuracy and
        # Stability, section 3.1); the few more are for z, w and the score, which are rounded too.
        # Twice that may change between two logits, for hidden states of length one
        self.dim = self.blocks[0].basis.shape[0]
        self.ranks = [block.values.shape[1] for block in self.blocks]
        self.rounding = torch.finfo(self.dtype).eps * (max(self.ranks) + 4) * self.longest
        self.compiled: Any = None  # see compiled_search
