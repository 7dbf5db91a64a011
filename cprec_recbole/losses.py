"""Cross-entropy of a softmax over factorised rows, value and gradient in pieces.

The plain computation holds logits, probabilities and their gradient, each `[N, k]`: 25 GB for 2,048
targets and a million items. Here a piece of logits is made, used for loss and gradient while it is
in the processor's cache, and forgotten. The gradient is computed with the value, since both need
the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cprec_recbole.partition import PADDING

# Sizes that measured best on a CPU with 1 MiB of L2 cache for each of two cores, on one thread and
# on two; nothing depends on them but speed
_TILE = 2**20  # logits that are worked on at a time
_KEPT = 2**22  # logits of a group of rows that stay in the L3 cache between the two sweeps
# Rows of a group: with fewer, or fewer kept, reading the factors takes the time, and logits are
# sooner made twice than fetched from memory; with more, pieces are too narrow for high ranks.
_FEWEST_ROWS, _MOST_ROWS = 64, 512
_ALIGNMENT = 64  # numbers; tensors that start within a cache line are a tenth slower

# Writes target probabilities of some rows, `[m, k]`, into its last argument; the second is scratch
SoftTargets = Callable[[slice, Tensor, Tensor], None]
Targets = Tensor | SoftTargets


class LogitBlock(NamedTuple):
    """Columns of logits, `codes @ rows.T`: hidden states in a block's own space, `[N, r]`, times
    the block's rows, `[k, r]`."""

    codes: Tensor
    rows: Tensor


class Workspace:
    """Memory for logits. Where it serves step after step, it is asked for once: asking again costs
    more than its use.

    Args:
        memory: bytes that the logits held at a time may take; one row fits in any case.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self._held = memory, torch.empty(0)

    def take(self, sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Tensors of some sizes, not initialised, with the device and precision of `like`."""
        aligned = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        total, kind = sum(aligned), (self._held.dtype, self._held.device)
        if len(self._held) < total or kind != (like.dtype, like.device):
            self._held = like.new_empty(0)  # the old memory goes before the new one comes
            self._held = like.new_empty(total)
        parts = self._held[:total].split(aligned)
        return [part[:size] for part, size in zip(parts, sizes)]


def cross_entropy(
    blocks: Sequence[LogitBlock], targets: Targets, workspace: Workspace, *, padded: bool = False
) -> Tensor:
    """Summed cross-entropy of targets and one softmax over the columns of all blocks, `[]`.

    Values and gradients are those of `torch.nn.functional.cross_entropy(..., reduction="sum")` on
    the concatenated logits, but for rounding. Under autocast products are computed in its precision
    and everything else in float32. Cannot be differentiated twice.

    Args:
        blocks: the columns; codes `[N, r_j]` and rows `[k_j, r_j]` of each.
        targets: column of each row's target, counted over all blocks, `[N]`; or what writes a
            probability for each column, which sum to 1.
        workspace: memory for the logits.
        padded: whether the first column is the padding item, which has no probability in either.
    """
    tensors = [tensor for block in blocks for tensor in block]
    return _CrossEntropy.apply(targets, workspace, padded, *tensors)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient of `cross_entropy`; the gradient waits for its scale."""

    @staticmethod
    def forward(
        ctx: Any, targets: Targets, workspace: Workspace, padded: bool, *tensors: Tensor
    ) -> Tensor:
        blocks = [LogitBlock(*pair) for pair in zip(tensors[::2], tensors[1::2])]
        device, product = tensors[0].device.type, tensors[1].dtype
        if torch.is_autocast_enabled(device):
            product = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            differentiated = any(ctx.needs_input_grad[3:])
            sweeps = _Sweeps(blocks, targets, workspace, padded, product, differentiated)
            total = sweeps.loss()
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.gradients = [tensor for pair in zip(sweeps.d_codes, sweeps.d_rows) for tensor in pair]
        return total.to(torch.promote_types(tensors[0].dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        scaled: list[Tensor | None] = []
        for by_rank, dtype, needed in zip(ctx.gradients, ctx.dtypes, ctx.needs_input_grad[3:]):
            by_row = by_rank.new_empty(by_rank.T.shape)  # its rows together, as optimizers want it
            scaled.append(torch.mul(by_rank.T, scale, out=by_row).to(dtype) if needed else None)
        return None, None, None, *scaled


def plan(
    n_rows: int, n_columns: int, logits: int, *, soft: bool, differentiated: bool, caches: bool
) -> tuple[int, int, bool]:
    """How logits `[n_rows, n_columns]` are cut: rows of a group, columns of a piece at most, and
    whether all pieces of a group are kept between its two sweeps.

    Args:
        n_rows: how many rows.
        n_columns: how many columns.
        logits: how many may be held, and as many probabilities; with soft targets, of which whole
            rows are held, how many of all three together.
        soft: whether targets are probabilities.
        differentiated: whether there is a second sweep.
        caches: whether pieces that fit a cache are quicker. On a GPU launches cost, and there is
            none: all rows at once, or many of them, in pieces as wide as may be.
    """
    if soft:
        tile, most = _TILE if caches else logits, n_rows
        kept, keeps = logits // (3 * n_columns), True
    elif caches:
        tile, most = min(logits, _TILE), min(n_rows, _MOST_ROWS)
        kept = min(logits, _KEPT) // n_columns
        keeps = differentiated and kept >= min(n_rows, _FEWEST_ROWS)
    else:
        tile, most = max(1, logits // 2), n_rows
        kept = tile // n_columns
        keeps = differentiated and kept >= min(n_rows, _MOST_ROWS)
    rows = max(1, min(most, kept if keeps else tile))
    return rows, min(n_columns, max(1, tile // rows)), keeps


class _Piece(NamedTuple):
    """Columns of one block: its number, which of its rows, and which of the columns of all."""

    block: int
    rows: slice
    columns: slice


def _pieces(blocks: Sequence[LogitBlock], width: int) -> Iterator[_Piece]:
    """The columns of all blocks in pieces of at most `width`, those of a block equally wide."""
    before = 0
    for j, block in enumerate(blocks):
        n = len(block.rows)
        size = -(-n // -(-n // width))
        for start in range(0, n, size):
            end = min(start + size, n)
            yield _Piece(j, slice(start, end), slice(before + start, before + end))
        before += n


class _Sweeps:
    """The two sweeps over the logits of a group of rows, piece by piece.

    The first finds the normaliser, the second the gradient. Between them the pieces, each a softmax
    of its own, are kept where the plan says so, else made again.

    Args:
        blocks, targets, workspace, padded: as in `cross_entropy`.
        product: precision of products with the rows.
        differentiated: whether gradients are wanted, in `d_codes` and `d_rows`. Ranks come first
            there: products with a few columns are several times slower than with a few rows.
    """

    def __init__(
        self,
        blocks: Sequence[LogitBlock],
        targets: Targets,
        workspace: Workspace,
        padded: bool,
        product: torch.dtype,
        differentiated: bool,
    ) -> None:
        self.blocks, self.targets, self.padded = blocks, targets, padded
        self.product, self.differentiated = product, differentiated
        exact = torch.promote_types(product, torch.float32)
        # float16 has no room for the probabilities of rare items
        self.slope = exact if product == torch.float16 else product
        self.zero = blocks[0].codes.new_zeros((), dtype=exact)
        self.d_codes = [self.zero.new_zeros(b.codes.T.shape) for b in blocks if differentiated]
        self.d_rows = [self.zero.new_zeros(b.rows.T.shape) for b in blocks if differentiated]
        n_rows, n_columns = len(blocks[0].codes), sum(len(block.rows) for block in blocks)
        soft = not isinstance(targets, Tensor)
        size, width, self.keeps = plan(
            n_rows,
            n_columns,
            logits=max(1, workspace.memory // exact.itemsize),
            soft=soft,
            differentiated=differentiated,
            caches=self.zero.device.type == "cpu",
        )
        self.groups = [slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]
        self.pieces = list(_pieces(blocks, width))
        held = [width, n_columns if self.keeps else width, n_columns if soft else 0]
        self._logits, self._probabilities, self._soft_targets = workspace.take(
            [size * columns for columns in held], self.zero
        )

    def loss(self) -> Tensor:
        """The summed loss, `[]`; its gradient is added."""
        total = sum(map(self._group_loss, self.groups), self.zero)
        if isinstance(self.targets, Tensor):
            total = total - self._add_targets(self.targets)
        return total

    def _group_loss(self, group: slice) -> Tensor:
        """The same for a group of rows; without soft targets only the normaliser's part of both."""
        targets = None
        if not isinstance(self.targets, Tensor):
            shape = group.stop - group.start, self.pieces[-1].columns.stop
            targets = _view(self._soft_targets, *shape)
            self.targets(group, _view(self._probabilities, *shape), targets)
        log_sums, agreed = [], self.zero
        for piece in self.pieces:
            logits, softmax = self._softmax(group, piece)
            # the highest probability is one over the normaliser: no second pass of exponentials
            log_sums.append(logits.amax(1) - softmax.amax(1).log())
            if targets is not None:
                agreed = agreed + logits.mul_(targets[:, piece.columns]).sum(1)
        by_piece = torch.stack(log_sums, 1)  # [m, pieces]
        log_sum = by_piece.logsumexp(1)
        if self.differentiated:
            weights = (by_piece - log_sum.unsqueeze(1)).exp()  # probability of each piece
            for piece, weight in zip(self.pieces, weights.unbind(1)):
                self._add_gradients(group, piece, weight, targets)
        return (log_sum - agreed).sum()

    def _add_targets(self, target: Tensor) -> Tensor:
        """Sum of the targets' logits, `[]`; their part of the gradients is added."""
        total, start = self.zero, 0
        for j, (codes, rows) in enumerate(self.blocks):
            here = (target >= start) & (target < start + len(rows))
            row = (target - start).clamp(0, len(rows) - 1)
            start += len(rows)
            # no branch on whether any is here: a GPU would have to wait for the answer
            own_rows = rows[row].to(self.zero.dtype) * here.unsqueeze(1)
            own_codes = codes.to(self.zero.dtype) * here.unsqueeze(1)
            total = total + (own_rows * own_codes).sum()
            if self.differentiated:
                self.d_codes[j] -= own_rows.T
                self.d_rows[j].index_add_(1, row, own_codes.T, alpha=-1)
        return total

    def _softmax(self, group: slice, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Logits of a piece and the softmax over its columns, `[m, w]`, `[m, w]`."""
        block = self.blocks[piece.block]
        codes, rows = block.codes[group].to(self.product), block.rows[piece.rows].to(self.product)
        logits = _view(self._logits, len(codes), len(rows))
        multiply(codes, rows, logits)
        if self.padded and piece.columns.start == PADDING:
            logits[:, PADDING] = torch.finfo(logits.dtype).min  # -inf times a target of 0 is NaN
        return logits, torch.softmax(logits, 1, out=self._kept(group, piece))

    def _kept(self, group: slice, piece: _Piece) -> Tensor:
        """Where the softmax of a piece is, `[m, w]`."""
        m, width = group.stop - group.start, piece.columns.stop - piece.columns.start
        start = m * piece.columns.start if self.keeps else 0
        return _view(self._probabilities[start:], m, width)

    def _add_gradients(
        self, group: slice, piece: _Piece, weight: Tensor, targets: Tensor | None
    ) -> None:
        """Add the gradients of a piece, whose columns have the probability `weight [m]`."""
        softmax = self._kept(group, piece) if self.keeps else self._softmax(group, piece)[1]
        if targets is not None:
            softmax.mul_(weight.unsqueeze(1)).sub_(targets[:, piece.columns])
            weight = torch.ones_like(weight)
        slope, block = softmax.to(self.slope), self.blocks[piece.block]
        by_rank = block.rows[piece.rows].to(self.slope).T.contiguous()
        codes = (block.codes[group] * weight.unsqueeze(1)).to(self.slope)
        self.d_codes[piece.block][:, group] += (by_rank @ slope.T) * weight
        d_rows = self.d_rows[piece.block][:, piece.rows]
        if self.slope == d_rows.dtype:
            d_rows.addmm_(codes.T, slope)
        else:
            d_rows += codes.T @ slope


def multiply(codes: Tensor, rows: Tensor, out: Tensor) -> None:
    """Logits `codes @ rows.T` into `out`, which may have another precision, `[m, k]`."""
    if codes.dtype == rows.dtype == out.dtype:
        torch.mm(codes, rows.T, out=out)
    else:
        out.copy_(codes @ rows.T)


def _view(memory: Tensor, n_rows: int, n_columns: int) -> Tensor:
    return memory[: n_rows * n_columns].view(n_rows, n_columns)
