"""The block embedding: popular items get a high rank, the long tail a low one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.config import CompressionError
from cprec_recbole.integers import ROWS_AT_A_TIME, Int8Rows, not_trained
from cprec_recbole.losses import LogitBlock
from cprec_recbole.partition import PADDING, Partition
from cprec_recbole.versions import Version

# A block with fewer rows has a dense gradient: a step over all of them is sooner done
SPARSE_ROWS = 2**14
# A look-up of one item in so many is sooner done with the vectors of all
_MANY = 8
# Of so many items the vectors are kept, where nothing needs a gradient: one look-up, 8 MiB at d 64
FEW_ITEMS = 2**15


class Block(nn.Module):
    """The factors of one block: its items' vectors are `weight @ projection`.

    Args:
        size: items `k` in the block.
        rank: rank `r` of the block.
        dim: size `d` of an item vector. Where `r == d` there is no projection.

    Attributes:
        sparse: whether a look-up's gradient holds the rows that were looked up and no others. Where
            something else reads all rows it is dense all the same.
    """

    def __init__(self, size: int, rank: int, dim: int) -> None:
        super().__init__()
        self.sparse = False
        self.weight = nn.Parameter(torch.empty(size, rank))
        self.projection = nn.Parameter(torch.empty(rank, dim)) if rank != dim else None

    @property
    def rank(self) -> int:
        """Rank `r` of the block."""
        return self.weight.shape[1]

    def rows(self) -> Tensor | Int8Rows:
        """The rows without a gradient, as a search reads them, `[k, r]`."""
        return self.weight.detach()

    def whole(self) -> Tensor:
        """All rows at once, `[k, r]`, with their gradient if they have one."""
        return self.weight

    def extend(self, rows: Tensor) -> None:
        """Append rows `[n, r]`; those that are there stay as they are."""
        weight = torch.cat([self.weight.detach(), rows])
        self.weight = nn.Parameter(weight, self.weight.requires_grad)

    def look_up(self, positions: Tensor, start: int) -> Tensor:
        """Rows of those positions that are in this block, which starts at one, and zero for others,
        `[...] -> [..., r]`. The padding row gets no gradient."""
        # every block looks up every position, its first row for those of others: cheap at low rank,
        # and no round trip to the host to count items; but with sparse gradients, which hold the
        # rows that were read, only its own
        here = (positions >= start) & (positions < start + len(self.weight))
        rows = torch.where(here, positions - start, 0)
        padding = PADDING if start == 0 else None
        if self.sparse:
            own = self._embed(rows[here], padding)
            return own.new_zeros(*rows.shape, own.shape[-1]).index_put((here,), own)
        return torch.where(here.unsqueeze(-1), self._embed(rows, padding), 0.0)

    def _embed(self, rows: Tensor, padding: int | None) -> Tensor:
        return F.embedding(rows, self.weight, padding_idx=padding, sparse=self.sparse)

    def into_rank(self, hidden: Tensor) -> Tensor:
        """Hidden states in the block's own space, `[..., d] -> [..., r]`."""
        return hidden if self.projection is None else hidden @ self.projection.T

    def out_of_rank(self, codes: Tensor) -> Tensor:
        """Rows of the block as item vectors, `[..., r] -> [..., d]`."""
        return codes if self.projection is None else codes @ self.projection

    def logits(self, hidden: Tensor) -> Tensor:
        """Products with the block's items, `[..., d] -> [..., k]`, without a `[k, d]` table."""
        return self.into_rank(hidden) @ self.weight.T

    def logit_block(self, hidden: Tensor) -> LogitBlock:
        """The block's part of a softmax, as a loss reads it, of hidden states `[N, d]`; a
        CompressionError for quantized rows, which cannot be trained."""
        return LogitBlock(self.into_rank(hidden), self.weight)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{len(self.weight)}, rank={self.rank}"


class QuantizedBlock(Block):
    """A block whose rows are whole numbers, `weight`, times `scale`; its projection stays in float.
    It holds no gradient: whole numbers cannot take an optimizer's small steps.

    Args:
        rows: in int8 or int4.
        projection: of the block, `[r, d]`; None where `r == d`.
    """

    def __init__(self, rows: Int8Rows, projection: nn.Parameter | None) -> None:
        super().__init__(0, 0, 0)
        self.projection = projection
        self.put(rows)
        self.requires_grad_(False)

    @classmethod
    def empty(cls, rows_type: type[Int8Rows], size: int, rank: int, dim: int) -> QuantizedBlock:
        """A block of zeros, to be filled."""
        zeros = rows_type.of(torch.zeros(size, rank))
        return cls(zeros, nn.Parameter(torch.zeros(rank, dim)) if rank != dim else None)

    def put(self, rows: Int8Rows) -> None:
        """Replace the rows."""
        self._rows_type = type(rows)
        self.weight = nn.Parameter(rows.values, requires_grad=False)
        self.scale = nn.Parameter(rows.scales.detach(), requires_grad=False)

    @property
    def rank(self) -> int:
        """See Block.rank."""
        return self.rows().shape[1]

    def rows(self) -> Int8Rows:
        """See Block.rows."""
        return self._rows_type(self.weight.detach(), self.scale.detach())

    def whole(self) -> Tensor:
        """See Block.whole: a copy in float."""
        return self.rows()[:]

    def extend(self, rows: Tensor) -> None:
        """See Block.extend; the rows that are there keep their numbers."""
        self.put(self.rows().with_more(rows))

    def logits(self, hidden: Tensor) -> Tensor:
        """See Block.logits; rows become float a piece at a time."""
        codes, pieces = self.into_rank(hidden), self.rows().split(ROWS_AT_A_TIME)
        return torch.cat([F.linear(codes, piece) for piece in pieces], dim=-1)

    def logit_block(self, hidden: Tensor) -> LogitBlock:
        """See Block.logit_block; always an error."""
        raise not_trained(self._rows_type.dtype_name)

    def _embed(self, rows: Tensor, padding: int | None) -> Tensor:
        return self.rows()[rows]

    def extra_repr(self) -> str:
        """See Block.extra_repr."""
        return f"{super().extra_repr()}, {self._rows_type.dtype_name}"


class BlockEmbedding(nn.Module):
    """An item table `[n_items, d]` kept as low-rank blocks by popularity (CpRec, section 3.2).

    Item x in row g of block j has the vector `W_j[g] P_j`, of `blocks[j].weight` and
    `blocks[j].projection`. A drop-in for the `nn.Embedding` of a RecBole model: call it with item
    ids. Row 0 of the head is the padding item; look-ups of it get no gradient.

    Args:
        partition: which item is where.
        ranks: rank of each block, `[n_blocks]`.
        dim: size `d` of an item vector.
        make_block: what makes the blocks, from size, rank and dim.
    """

    def __init__(
        self,
        partition: Partition,
        ranks: Sequence[int],
        dim: int,
        make_block: Callable[[int, int, int], Block] = Block,
    ) -> None:
        super().__init__()
        if len(ranks) != len(partition.sizes) or not all(0 < rank <= dim for rank in ranks):
            raise CompressionError(
                f"Expected `ranks` to be {len(partition.sizes)} numbers from 1 to {dim}, but got "
                f"{list(ranks)}."
            )
        self.partition = partition
        self.dim = dim
        self.factors = nn.ModuleList(
            make_block(size, rank, dim) for size, rank in zip(partition.sizes, ranks)
        )
        self._kept: tuple[Version, Tensor] | None = None
        self.reset_parameters(std=1 / math.sqrt(dim))

    @property
    def blocks(self) -> list[Block]:
        """The blocks from head to tail; the factors that a tied softmax reads too."""
        return cast("list[Block]", list(self.factors))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of item vectors."""
        return self.blocks[0].rows().dtype

    @property
    def quantized(self) -> str | None:
        """In which dtype of whole numbers the rows are, `int8` or `int4`; None for float."""
        rows = self.blocks[0].rows()
        return rows.dtype_name if isinstance(rows, Int8Rows) else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each block, `[n_blocks]`."""
        return tuple(block.rank for block in self.blocks)

    def look_up_sparsely(self, fewest_rows: int = SPARSE_ROWS) -> None:
        """Give look-ups of the larger blocks sparse gradients. For tables that nothing but look-ups
        reads, with an optimizer that takes such gradients."""
        for block in self.blocks:
            block.sparse = len(block.weight) >= fewest_rows

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Draw factors whose products have entries of standard deviation `std`, as the rows have
        themselves; quantized rows, which are made of others, stay."""
        # projections get orthogonal rows of length sqrt(d / r). So a block of any rank starts with
        # vectors as long as a full table's, and an optimizer that moves every parameter equally
        # (Adam) moves them equally fast
        if self.quantized:
            return
        for block in self.blocks:
            block.weight.normal_(0.0, std)
            if block.projection is not None:
                nn.init.orthogonal_(block.projection, gain=self._gain(block))
        self.blocks[0].weight[PADDING] = 0.0

    @torch.no_grad()
    def approximate(self, table: Tensor, counts: Tensor, importance: Tensor | None = None) -> None:
        """Take the best factors of a given table: those of least squared error, each vector
        weighted by how often its item occurs. Lossless where a block's rank is d.

        Args:
            table: item vectors in id order, `[n_items, d]`.
            counts: training interactions of each id, `[n_items]`.
            importance: what an error `e` costs: `e @ importance @ e`, `[d, d]`, positive definite;
                None: its squared length.
        """
        order = self.partition.item_at.long().to(table.device)
        for block, items in zip(self.blocks, order.split(self.partition.sizes)):
            rows = table[items]
            if block.projection is not None:
                rank = block.projection.shape[0]
                codes, basis = _best_factors(rows, counts[items], rank, importance)
                gain = self._gain(block)  # as in a fresh block: training goes on equally fast
                block.projection.copy_(basis * gain)
                rows = codes / gain
            block.weight.copy_(rows)

    def _gain(self, block: Block) -> float:
        return math.sqrt(self.dim / block.rank)

    def forward(self, items: Tensor) -> Tensor:
        """Vectors of item ids, `[...] -> [..., d]`."""
        if not torch.is_grad_enabled() and self.keeps_vectors:
            return F.embedding(items, self.kept_vectors())
        positions = self.partition.positions(items)
        is_sparse = any(block.sparse for block in self.blocks)
        if self.training and not is_sparse and self.partition.n_items <= _MANY * items.numel():
            # its gradient is of all vectors in any case, so that these may be made first
            return F.embedding(positions, self._by_position(), PADDING)
        vectors = torch.zeros((), dtype=self.dtype, device=items.device)
        for block, start in zip(self.blocks, self.partition.starts):
            vectors = vectors + block.out_of_rank(block.look_up(positions, start))
        return vectors

    def _by_position(self) -> Tensor:
        """The whole table in popularity order, `[n_items, d]`."""
        vectors = [block.out_of_rank(block.whole()) for block in self.blocks]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)

    @property
    def keeps_vectors(self) -> bool:
        """Whether look-ups without a gradient read `kept_vectors`; never in a graph of one."""
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return self.partition.n_items <= FEW_ITEMS and not is_traced

    @torch.no_grad()
    def kept_vectors(self) -> Tensor:
        """The whole table as `dense` gives it, made once for each version of the weights; not to
        be written to."""
        if self._kept is None or not self._kept[0].is_current():
            self._kept = Version(self), self.dense()
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies and pickles make their own

    def dense(self) -> Tensor:
        """The whole table in id order, `[n_items, d]`. For tests and small catalogues only."""
        return self._by_position().index_select(0, self.partition.position_of)

    def norm(self) -> Tensor:
        """Frobenius norm of the whole table, `[]`, without building it: of `W P`, from the two
        `[r, r]` Gram matrices."""
        squares = []
        for block in self.blocks:
            rows, basis = block.whole(), block.projection
            square = rows.square() if basis is None else (rows.T @ rows) * (basis @ basis.T)
            squares.append(square.sum())
        return torch.stack(squares).sum().sqrt()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"dim={self.dim}, ranks={list(self.ranks)}"


def _best_factors(
    rows: Tensor, counts: Tensor, rank: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes `[k, rank]` and orthonormal directions `[rank, d]` whose product is nearest to the
    weighted rows. With an importance `R R^T` the rows `E R` are approximated, and what was found is
    turned back by `R^-1`."""
    weights = counts.to(rows.device, torch.float64).clamp(min=1)  # never seen counts as seen once
    exact = rows.double()
    gram = exact.T @ (exact * weights.unsqueeze(1))
    if importance is not None:
        root = torch.linalg.cholesky(importance)
        gram = root.T @ gram @ root
    # the right singular vectors, also where a block has fewer rows than d; by rising eigenvalue
    into = basis = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    if importance is not None:
        back = torch.linalg.solve_triangular(root.T, basis, upper=True)
        basis, triangle = torch.linalg.qr(back)
        into = root @ into @ triangle.T
    return rows @ into.to(rows.dtype), basis.T.to(rows.dtype)
