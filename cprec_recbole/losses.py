"""Cross-entropy of a softmax over factorised rows, value and gradient in pieces.

The plain computation holds logits, probabilities and their gradient, each `[N, k]`: 25 GB for 2,048
targets and a million items. Here the logits of some rows, or of some of their columns, are made,
used for loss and gradient, and forgotten. The gradient is computed with the value, since both need
the same logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cprec_recbole.partition import PADDING

# Sizes that measured best on a CPU with 1 MiB of L2 cache for each of two cores, on one thread and
# on two; nothing depends on them but speed
_TILE = 2**20  # logits that are worked on at a time
_KEPT = 2**22  # logits of a group of rows that stay in the L3 cache between the two sweeps
# Rows of a group: with fewer, or fewer whole, reading the factors takes the time, and logits are
# sooner made twice than fetched from memory; with more, pieces are too narrow for high ranks.
_FEWEST_ROWS, _MOST_ROWS = 64, 512
# Numbers in a cache line: products into rows that are no multiple of it take twice the time
_ALIGNMENT = 16
_LOGITS, _SOFTMAX, _TARGETS = 0, 1, 2  # what is held of a span, in that order

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

    def holds(self, n_rows: int, n_columns: int, like: Tensor) -> bool:
        """Whether logits `[n_rows, n_columns]` and their softmax fit, in the precision of `like`
        or float32."""
        return 2 * n_rows * n_columns * max(like.element_size(), 4) <= self.memory

    @staticmethod
    def is_cached(like: Tensor) -> bool:
        """Whether what is worked on at a time should fit a cache, and nothing is waited for: on a
        CPU. On a GPU launches cost, and there is no such cache."""
        return like.device.type == "cpu"

    def take(self, size: int, like: Tensor) -> Tensor:
        """So many numbers, not initialised, with the device and precision of `like`."""
        kind = (self._held.dtype, self._held.device)
        if len(self._held) < size or kind != (like.dtype, like.device):
            self._held = like.new_empty(0)  # the old memory goes before the new one comes
            self._held = like.new_empty(size)
        return self._held


def cross_entropy(
    blocks: Sequence[LogitBlock],
    targets: Targets,
    workspace: Workspace,
    *,
    padded: bool = False,
    counts: Tensor | None = None,
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
        counts: whether a row counts, `[N]`, where targets are columns; every row if left out. The
            target of one that does not is any column.
    """
    tensors = [tensor for block in blocks for tensor in block]
    return _CrossEntropy.apply(targets, workspace, padded, counts, *tensors)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient of `cross_entropy`; the gradient waits for its scale."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Targets,
        workspace: Workspace,
        padded: bool,
        counts: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        blocks = [LogitBlock(*pair) for pair in zip(tensors[::2], tensors[1::2])]
        device, product = tensors[0].device.type, tensors[1].dtype
        if torch.is_autocast_enabled(device):
            product = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            differentiated = any(ctx.needs_input_grad[4:])
            sweeps = _Sweeps(blocks, targets, workspace, padded, counts, product, differentiated)
            total = sweeps.loss()
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.gradients = [tensor for pair in zip(sweeps.d_codes, sweeps.d_rows) for tensor in pair]
        return total.to(torch.promote_types(tensors[0].dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        scaled: list[Tensor | None] = []
        for by_rank, dtype, needed in zip(ctx.gradients, ctx.dtypes, ctx.needs_input_grad[4:]):
            by_row = by_rank.new_empty(by_rank.shape[::-1])  # rows together, as optimizers want it
            scaled.append(torch.mul(by_rank.T, scale, out=by_row).to(dtype) if needed else None)
        return None, None, None, None, *scaled


def plan(
    n_rows: int, n_columns: int, logits: int, *, soft: bool, caches: bool
) -> tuple[int, int, bool]:
    """How logits `[n_rows, n_columns]` are cut: rows of a group, columns of a span, and whether the
    softmax of a group's spans is kept for the gradient; else logits are made twice.

    Args:
        n_rows: how many rows.
        n_columns: how many columns.
        logits: how many may be held, with as many probabilities, and soft targets where they are.
        soft: whether targets are probabilities, of which whole rows are held.
        caches: whether what fits a cache is quicker. On a GPU launches cost, and there is none: all
            rows at once, or many of them, in spans as wide as may be.
    """
    room = logits // (3 if soft else 2)
    kept, tile, most, fewest = room, room, n_rows, _MOST_ROWS
    if caches:
        kept, tile, most, fewest = min(room, _KEPT), min(room, _TILE), _MOST_ROWS, _FEWEST_ROWS
    if n_rows * n_columns <= kept:
        return max(1, n_rows), n_columns, True
    if soft:
        kept, most, fewest = room, n_rows, 0
    whole = kept // n_columns
    keeps = whole >= min(n_rows, fewest)
    rows = max(1, min(n_rows, most, whole if keeps else tile // _ALIGNMENT))
    width = max(_ALIGNMENT, tile // rows // _ALIGNMENT * _ALIGNMENT)
    width = _aligned(-(-n_columns // -(-n_columns // width)))  # spans of about one width
    return rows, min(n_columns, width), keeps


class _Part(NamedTuple):
    """Rows of a block that are columns of a span: the block's number, and which of each."""

    block: int
    rows: slice
    columns: slice


class _Span(NamedTuple):
    """Columns beside each other: their number among the spans, the first one, how many, whether
    these are all, and the rows that they are made of."""

    number: int
    start: int
    width: int
    is_all: bool
    parts: list[_Part]


def _spans(blocks: Sequence[LogitBlock], width: int) -> list[_Span]:
    """The columns of all blocks in spans of `width`; the last may be narrower."""
    ends = list(itertools.accumulate(len(block.rows) for block in blocks))
    begins = [0, *ends[:-1]]
    spans: list[_Span] = []
    for start in range(0, ends[-1], width):
        stop = min(start + width, ends[-1])
        parts = []
        for j, (begin, end) in enumerate(zip(begins, ends)):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                rows = slice(first - begin, last - begin)
                parts.append(_Part(j, rows, slice(first - start, last - start)))
        spans.append(_Span(len(spans), start, stop - start, width >= ends[-1], parts))
    return spans


class _Columns:
    """Targets of a group of rows that are columns `[m]`; `share [m]` is 1 where they count."""

    def __init__(self, spans: Sequence[_Span], target: Tensor, share: Tensor) -> None:
        # of each span the column that is the target, and 1 where it is and counts, `[m, 1]` twice
        self.within = [(target.unsqueeze(1), share.unsqueeze(1))]
        if len(spans) > 1:
            ((target, share),) = self.within
            columns = [target - span.start for span in spans]
            self.within = [
                (c.clamp(0, span.width - 1), share * ((c >= 0) & (c < span.width)))
                for c, span in zip(columns, spans)
            ]

    def agreement(self, span: _Span, logits: Tensor) -> Tensor:
        """The targets' logits where a span has them, `[m]`."""
        column, share = self.within[span.number]
        return logits.gather(1, column).mul_(share).squeeze(1)

    def subtract(self, span: _Span, slope: Tensor) -> None:
        """Take the targets' probabilities from those of a span, `[m, w]`."""
        column, share = self.within[span.number]
        slope.scatter_add_(1, column, share.neg())


class _Probabilities:
    """Targets of a group of rows that are probabilities of all columns, `[m, k]`."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def _within(self, span: _Span) -> Tensor:
        return _cut(self.targets, 1, slice(span.start, span.start + span.width))

    def agreement(self, span: _Span, logits: Tensor) -> Tensor:
        """See _Columns.agreement: the logits' mean by the targets; they are used up."""
        return _cut(logits, 1, slice(0, span.width)).mul_(self._within(span)).sum(1)

    def subtract(self, span: _Span, slope: Tensor) -> None:
        """See _Columns.subtract."""
        _cut(slope, 1, slice(0, span.width)).sub_(self._within(span))


class _Sweeps:
    """The two sweeps over the logits of a group of rows, span by span.

    The first finds the normaliser, the second the gradient. Between them the softmax of each span
    is kept where the plan says so, else logits are made again.

    Args:
        blocks, targets, workspace, padded, counts: as in `cross_entropy`.
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
        counts: Tensor | None,
        product: torch.dtype,
        differentiated: bool,
    ) -> None:
        self.blocks, self.targets, self.padded, self.counts = blocks, targets, padded, counts
        self.product, self.differentiated = product, differentiated
        exact = torch.promote_types(product, torch.float32)
        # float16 has no room for the probabilities of rare items
        self.slope = exact if product == torch.float16 else product
        self.zero = blocks[0].codes.new_zeros((), dtype=exact)
        self.d_codes = [self.zero.new_zeros(b.codes.shape[::-1]) for b in blocks if differentiated]
        self.d_rows = [self.zero.new_zeros(b.rows.shape[::-1]) for b in blocks if differentiated]
        n_rows, n_columns = len(blocks[0].codes), sum(len(block.rows) for block in blocks)
        # 1 for each row that counts
        self.share = self.zero.new_ones(n_rows) if counts is None else counts.to(exact)
        soft = not isinstance(targets, Tensor)
        size, width, self.keeps = plan(
            n_rows,
            n_columns,
            logits=workspace.memory // exact.itemsize,
            soft=soft,
            caches=workspace.is_cached(self.zero),
        )
        self.groups = [slice(i, min(i + size, n_rows)) for i in range(0, n_rows, size)]
        self.spans = _spans(blocks, width)
        # a span of logits; then its softmax, or that of every span; then soft targets
        self.stride = size * _aligned(width)
        self.n_matrices = 1 + (len(self.spans) if self.keeps else 1)
        total = self.n_matrices * self.stride + (size * n_columns if soft else 0)
        self.memory = workspace.take(total, self.zero)

    def loss(self) -> Tensor:
        """The summed loss, `[]`; its gradient is added."""
        return sum(map(self._group_loss, self.groups), self.zero)

    def _group_loss(self, group: slice) -> Tensor:
        """The same for a group of rows."""
        m, share = group.stop - group.start, _cut(self.share, 0, group)
        aim = self._aim(group, share)
        log_sums, agreements = [], []
        for span in self.spans:
            logits = self._logits(group, span)
            slope = torch.softmax(logits, 1, out=self._kept(m, span))
            # the highest probability is one over the normaliser: no second pass of exponentials
            log_sums.append(logits.amax(1) - slope.amax(1).log())
            agreements.append(aim.agreement(span, logits))
        by_span = torch.stack(log_sums, 1)  # [m, spans]
        log_sum = by_span.logsumexp(1, keepdim=True)
        if self.differentiated:
            for span in self.spans:
                slope = self._kept(m, span)
                if not self.keeps:
                    torch.exp(self._logits(group, span).sub_(log_sum), out=slope)
                elif not span.is_all:
                    own = by_span.narrow(1, span.number, 1)
                    slope.mul_((own - log_sum).exp_())  # the span's probability
                if self.counts is not None:
                    slope.mul_(share.unsqueeze(1))
                aim.subtract(span, slope)
                self._add_gradients(group, span, slope)
        return (log_sum.squeeze(1) - reduce(torch.add, agreements)).dot(share)

    def _aim(self, group: slice, share: Tensor) -> _Columns | _Probabilities:
        """The targets of a group."""
        if isinstance(self.targets, Tensor):
            return _Columns(self.spans, _cut(self.targets, 0, group), share)
        shape = group.stop - group.start, sum(span.width for span in self.spans)
        targets = _matrix(self.memory, self.n_matrices * self.stride, *shape)
        self.targets(group, _matrix(self.memory, self.stride, *shape), targets)
        return _Probabilities(targets)

    def _kept(self, m: int, span: _Span) -> Tensor:
        """Where the softmax of a span is, `[m, w]`."""
        number = 1 + (span.number if self.keeps else 0)
        return _matrix(self.memory, number * self.stride, m, _aligned(span.width))

    def _logits(self, group: slice, span: _Span) -> Tensor:
        """Logits of a span, `[m, w]`."""
        logits = _matrix(self.memory, 0, group.stop - group.start, _aligned(span.width))
        for j, rows, columns in span.parts:
            codes = _cut(self.blocks[j].codes, 0, group).to(self.product)
            own = _cut(self.blocks[j].rows, 0, rows).to(self.product)
            multiply(codes, own, _cut(logits, 1, columns))
        lowest = torch.finfo(logits.dtype).min  # -inf times a target of 0 is NaN
        if logits.shape[1] > span.width:
            logits.narrow(1, span.width, logits.shape[1] - span.width).fill_(lowest)
        if self.padded and span.start == PADDING:
            logits.select(1, PADDING).fill_(lowest)
        return logits

    def _add_gradients(self, group: slice, span: _Span, slope: Tensor) -> None:
        """Add the gradients that follow from that of a span's logits, `[m, w]`."""
        slope = slope.to(self.slope)
        for j, rows, columns in span.parts:
            codes = _cut(self.blocks[j].codes, 0, group).to(self.slope)
            own = _cut(self.blocks[j].rows, 0, rows).to(self.slope)
            by_column = _cut(slope, 1, columns)
            _add_product(_cut(self.d_codes[j], 1, group), own.T, by_column.T)
            _add_product(_cut(self.d_rows[j], 1, rows), codes.T, by_column)


def multiply(codes: Tensor, rows: Tensor, out: Tensor) -> None:
    """Logits `codes @ rows.T` into `out`, which may have another precision, `[m, k]`."""
    if codes.dtype == rows.dtype == out.dtype:
        torch.mm(codes, rows.T, out=out)
    else:
        out.copy_(codes @ rows.T)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add `one @ other` to `total`, which may have another precision."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _cut(tensor: Tensor, axis: int, part: slice) -> Tensor:
    """A part of a tensor; itself where that is all."""
    length = part.stop - part.start
    return tensor if length == tensor.shape[axis] else tensor.narrow(axis, part.start, length)


def _matrix(memory: Tensor, start: int, n_rows: int, n_columns: int) -> Tensor:
    return memory.as_strided((n_rows, n_columns), (n_columns, 1), start)


def _aligned(width: int) -> int:
    return -(-width // _ALIGNMENT) * _ALIGNMENT
