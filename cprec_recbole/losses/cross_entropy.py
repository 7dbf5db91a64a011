"""Cross-entropy of a softmax over factorised rows, value and gradient in pieces.

The plain computation holds logits, probabilities and their gradient, each `[N, k]`: 25 GB for 2,048
targets and a million items. Here a piece of logits is made, used for loss and gradient while it is
in the processor's cache, and forgotten. The gradient is computed with the value, since both need
the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Strip(NamedTuple):
    """Columns of a softmax: `codes @ rows.T`, `[N, k]`.

    Attributes:
        codes: hidden states in the block's own space, `[N, r]`.
        rows: the block's rows, `[k, r]`.
    """

    codes: Tensor
    rows: Tensor


def cross_entropy(
    strips: Sequence[Strip], target: Tensor, memory: int, *, padded: bool = False
) -> Tensor:
    """Summed negative log-likelihood under one softmax over the columns of all strips, `[]`.

    Values and gradients are those of `torch.nn.functional.cross_entropy(..., reduction="sum")` on
    the concatenated logits, but for rounding. Under autocast products are computed in its precision
    and everything else in float32. Cannot be differentiated twice.

    Args:
        strips: the columns; codes `[N, r_j]` and rows `[k_j, r_j]` of each.
        target: column of each row's target, counted over all strips, `[N]`.
        memory: bytes that the logits held at a time may take.
        padded: whether the first column is the padding item, which has no probability.
    """
    tensors = [tensor for strip in strips for tensor in strip]
    dtype = product_dtype(target.device.type)
    return _CrossEntropy.apply(target, memory, padded, dtype, *tensors)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient of `cross_entropy`; the gradient waits for its scale."""

    @staticmethod
    def forward(
        ctx: Any, target: Tensor, memory: int, padded: bool, dtype: Any, *tensors: Tensor
    ) -> Tensor:
        strips = [Strip(*pair) for pair in zip(tensors[::2], tensors[1::2])]
        with torch.autocast(target.device.type, enabled=False):
            sweeps = Sweeps(strips, memory, padded, dtype, any(ctx.needs_input_grad[4:]))
            total = sweeps.exact.new_zeros(())
            for part in sweeps.groups():
                log_sum = sweeps.log_sum(part)
                sweeps.add_gradients(part, log_sum)
                total += log_sum.sum()
            total -= sweeps.add_targets(target)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.gradients = sweeps.gradients()
        return total.to(torch.promote_types(tensors[0].dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        return None, None, None, None, *scaled_gradients(ctx, scale, ctx.needs_input_grad[4:])


def scaled_gradients(ctx: Any, scale: Tensor, needed: Sequence[bool]) -> Iterator[Tensor | None]:
    """The gradients that a forward pass has left in `ctx`, in its `dtypes`, times what came back.

    Args:
        ctx: has `gradients` and `dtypes`, one for each tensor.
        scale: gradient of the loss, `[]`.
        needed: for which tensors.
    """
    for gradient, dtype, wanted in zip(ctx.gradients, ctx.dtypes, needed):
        if wanted:
            scaled = gradient.new_empty(gradient.shape)  # row by row, which it may not be
            yield torch.mul(gradient, scale, out=scaled).to(dtype)
        else:
            yield None


def log_sum(strip: Strip, memory: int, *, padded: bool = False) -> Tensor:
    """Logarithm of the normaliser of each row over the columns of a strip, `[N]`.

    For a softmax whose columns are in several places. Its gradient makes the logits again.

    Args:
        strip: the columns, one at least.
        memory: bytes that the logits held at a time may take.
        padded: whether the first column is the padding item, which has no probability.
    """
    return _LogSum.apply(memory, padded, product_dtype(strip.codes.device.type), *strip)


def _has_caches(device: torch.device) -> bool:
    """Whether pieces that fit a cache are quicker. On a GPU launches cost, and there is none."""
    return device.type == "cpu"


def product_dtype(device: str) -> torch.dtype | None:
    """Precision of products under autocast; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _LogSum(torch.autograd.Function):
    """Value and gradient of `log_sum`."""

    @staticmethod
    def forward(
        ctx: Any, memory: int, padded: bool, dtype: Any, codes: Tensor, rows: Tensor
    ) -> Tensor:
        ctx.save_for_backward(codes, rows)
        ctx.options = memory, padded, dtype
        with torch.autocast(codes.device.type, enabled=False):
            sweeps = Sweeps([Strip(codes, rows)], memory, padded, dtype, False)
            return torch.cat([sweeps.log_sum(part) for part in sweeps.groups()] or [codes[:, 0]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        codes, rows = ctx.saved_tensors
        memory, padded, dtype = ctx.options
        with torch.autocast(codes.device.type, enabled=False):
            sweeps = Sweeps([Strip(codes, rows)], memory, padded, dtype, True)
            for part in sweeps.groups():
                sweeps.add_gradients(part, sweeps.log_sum(part), gradient[part])
            d_codes, d_rows = sweeps.gradients()
        return None, None, None, d_codes.to(codes.dtype), d_rows.contiguous().to(rows.dtype)


class Sweeps:
    """The two sweeps over the logits of a group of rows, piece by piece.

    The first finds the normaliser, the second the gradient. Between them the pieces, each a softmax
    of its own, are kept where the budget allows, else made again. So for each group in turn:
    `log_sum`, then `add_gradients` of the same rows, which uses what `log_sum` left.

    Args:
        strips: the columns.
        memory: bytes that the logits held at a time may take.
        padded: whether the first column has no probability.
        dtype: precision of products with the rows; None for that of the rows.
        differentiated: whether gradients are wanted.
    """

    def __init__(
        self,
        strips: Sequence[Strip],
        memory: int,
        padded: bool,
        dtype: torch.dtype | None,
        differentiated: bool,
    ) -> None:
        self.strips, self.padded, self.differentiated = strips, padded, differentiated
        self.product = dtype or strips[0].rows.dtype
        half = self.product in (torch.float16, torch.bfloat16)
        self.exact = strips[0].codes.new_empty(0, dtype=torch.float32 if half else self.product)
        # float16 has no room for the probabilities of rare items
        self.slope = self.exact.dtype if self.product == torch.float16 else self.product
        self.n_rows = len(strips[0].codes)
        self._plan(max(1, memory // self.exact.element_size()))
        # ranks first: products with a few columns are several times slower than with a few rows
        self.d_codes = [self.exact.new_zeros(s.codes.T.shape) for s in strips if differentiated]
        self.d_rows = [self.exact.new_zeros(s.rows.T.shape) for s in strips if differentiated]

    def _plan(self, logits: int) -> None:
        """Rows of a group and columns of a piece, so that at most so many logits are held."""
        n_columns = sum(len(strip.rows) for strip in self.strips)
        most, few = min(self.n_rows, _MOST_ROWS), min(self.n_rows, _FEWEST_ROWS)
        if _has_caches(self.exact.device):
            tile, rows = min(logits, _TILE), min(min(logits, _KEPT) // n_columns, most)
        else:  # few launches: all rows at once, or many of them, in pieces as wide as may be
            tile, few, most = logits // 2, most, self.n_rows
            rows = min(tile // n_columns, most)
        self.keeps = self.differentiated and rows >= few
        if not self.keeps:  # two columns at least, so that not all of a piece is padding
            rows = min(most, max(1, tile // 2))
        self.size = max(1, rows)
        self.width = max(2, tile // self.size)
        # made once: memory that is given back and asked for again costs more than its use
        held = n_columns if self.keeps else min(self.width, n_columns)
        self._kept = self.exact.new_empty(self.size * held)
        self._logits = self.exact.new_empty(self.size * min(self.width, n_columns))

    def groups(self) -> Iterator[slice]:
        """Groups of rows."""
        for start in range(0, self.n_rows, self.size):
            yield slice(start, min(start + self.size, self.n_rows))

    def log_sum(self, part: slice) -> Tensor:
        """Logarithm of the normaliser of some rows, `[m]`."""
        sums = []
        for place in self._pieces():
            logits, piece = self._softmax(part, *place)
            # the highest logit's share is one over the normaliser: no second pass of exponentials
            sums.append(logits.amax(1) - piece.amax(1).log())
        self._sums = torch.stack(sums, 1)  # [m, pieces]
        return self._sums.logsumexp(1)

    def add_gradients(self, part: slice, log_sum: Tensor, scale: Tensor | None = None) -> None:
        """Add what the normalisers of some rows `[m]`, each times a scale `[m]`, give to the
        gradients."""
        if not self.differentiated:
            return
        shares = (self._sums - log_sum.unsqueeze(1)).exp()  # of each piece, [m, pieces]
        if scale is not None:
            shares = shares * scale.unsqueeze(1)
        for i, (j, columns, first) in enumerate(self._pieces()):
            piece = self._piece(part, columns, first)
            if not self.keeps:
                self._softmax(part, j, columns, first)
            piece, share = piece.to(self.slope), shares[:, i]
            codes, rows = self.strips[j].codes[part], self.strips[j].rows[columns]
            scaled = (codes * share.unsqueeze(1)).to(self.slope)
            by_rank = rows.to(self.slope).T.contiguous()
            self.d_codes[j][:, part] += (by_rank @ piece.T) * share
            if self.slope == self.exact.dtype:
                self.d_rows[j][:, columns].addmm_(scaled.T, piece)
            else:
                self.d_rows[j][:, columns] += scaled.T @ piece

    def add_targets(self, target: Tensor) -> Tensor:
        """Sum of the targets' logits, `[]`; their part of the gradients is added."""
        total, start = self.exact.new_zeros(()), 0
        for j, (codes, rows) in enumerate(self.strips):
            here = (target >= start) & (target < start + len(rows))
            row = (target - start).clamp(0, len(rows) - 1)
            start += len(rows)
            # no branch on whether any is here: a GPU would have to wait for the answer
            wanted = rows[row].to(self.exact.dtype) * here.unsqueeze(1)
            given = codes.to(self.exact.dtype) * here.unsqueeze(1)
            total += (wanted * given).sum()
            if self.differentiated:
                self.d_codes[j] -= wanted.T
                self.d_rows[j].index_add_(1, row, given.T, alpha=-1)
        return total

    def gradients(self) -> list[Tensor]:
        """Gradients of codes and rows of each strip in turn, `[N, r]` and `[k, r]`."""
        pairs = zip(self.d_codes, self.d_rows)
        return [gradient.T for pair in pairs for gradient in pair]

    def _pieces(self) -> Iterator[tuple[int, slice, int]]:
        """The strip and the columns of each piece, parts of equal size, and how many columns come
        before it."""
        before = 0
        for j, strip in enumerate(self.strips):
            n = len(strip.rows)
            size = -(-n // -(-n // self.width))
            for start in range(0, n, size):
                yield j, slice(start, min(start + size, n)), before + start
            before += n

    def _piece(self, part: slice, columns: slice, first: int) -> Tensor:
        """Where the softmax of a piece is kept, `[m, w]`; `first` columns come before it."""
        shape = part.stop - part.start, columns.stop - columns.start
        start = self.size * first if self.keeps else 0
        return self._kept[start : start + shape[0] * shape[1]].view(shape)

    def _softmax(self, part: slice, j: int, columns: slice, first: int) -> tuple[Tensor, Tensor]:
        """Logits of a piece and the softmax over its columns, `[m, w]`, `[m, w]`."""
        codes, rows = self.strips[j].codes[part], self.strips[j].rows[columns]
        logits = self._logits[: len(codes) * len(rows)].view(len(codes), len(rows))
        if self.product == codes.dtype == logits.dtype:
            torch.mm(codes, rows.T, out=logits)
        else:
            logits.copy_(codes.to(self.product) @ rows.to(self.product).T)
        if self.padded and j == 0 and columns.start == PADDING:
            logits[:, PADDING] = -torch.inf
        piece = self._piece(part, columns, first)
        torch.softmax(logits, 1, out=piece)
        return logits, piece
