"""Cross-entropy with a probability of every item, not one target, value and gradient at once.

PyTorch's own copies the logits on its way there and back, and where they do not fit the memory they
have to be made a second time for the gradient. Here logits, their softmax and the wanted
probabilities are made once, some rows at a time, in memory that is held from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cprec_recbole.losses.cross_entropy import Strip, product_dtype, scaled_gradients
from cprec_recbole.partition import PADDING

# Writes the wanted probabilities of some rows, `[m, k]`, into its last argument; the second is room
# for their logits
Opinion = Callable[[slice, Tensor, Tensor], None]

_HELD = 3  # of each row: logits, their softmax, wanted probabilities
# A product with fewer columns than this takes several times as long as the one with as few rows
_FEW_COLUMNS = 16


class Room:
    """Memory for the logits of a step, asked for once: asking again costs more than its use.

    Args:
        memory: bytes that it may take; one row is made room for in any case. Where products are in
            another precision than float32, as under autocast, copies of logits come on top.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self._held = memory, torch.empty(0)

    def take(self, n_rows: int, n_columns: int, like: Tensor) -> Tensor:
        """Room for some rows at a time, at most so many, `[3, m, k]`; what is in it is rubbish.

        Args:
            n_rows: how many there are.
            n_columns: logits of a row.
            like: has the device and the precision.
        """
        row = _HELD * n_columns
        m = max(1, min(n_rows, self.memory // (row * like.element_size())))
        if len(self._held) < m * row or self._held.dtype != like.dtype:
            self._held = like.new_empty(0)  # the old one goes before the new one comes
            self._held = like.new_empty(m * row)
        return self._held[: m * row].view(_HELD, m, n_columns)


def soft_cross_entropy(
    strips: Sequence[Strip], opinion: Opinion, room: Room, *, padded: bool = False
) -> Tensor:
    """Summed cross-entropy of wanted probabilities and one softmax over the columns of all strips,
    `[]`.

    Values and gradients are those of `torch.nn.functional.cross_entropy(..., reduction="sum")` on
    the concatenated logits, but for rounding. Under autocast products are computed in its precision
    and everything else in float32. Cannot be differentiated twice.

    Args:
        strips: the columns; codes `[N, r_j]` and rows `[k_j, r_j]` of each.
        opinion: fills in the wanted probabilities of some rows, which sum to 1.
        room: where to work.
        padded: whether the first column is the padding item, which has no probability in either.
    """
    tensors = [tensor for strip in strips for tensor in strip]
    dtype = product_dtype(tensors[0].device.type)
    return _SoftCrossEntropy.apply(opinion, room, padded, dtype, *tensors)


class _SoftCrossEntropy(torch.autograd.Function):
    """Loss and gradient of `soft_cross_entropy`; the gradient waits for its scale."""

    @staticmethod
    def forward(
        ctx: Any, opinion: Opinion, room: Room, padded: bool, dtype: Any, *tensors: Tensor
    ) -> Tensor:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        exact = torch.promote_types(tensors[0].dtype, torch.float32)
        product = dtype or tensors[0].dtype
        with torch.autocast(tensors[0].device.type, enabled=False):
            codes, rows = ([t.to(product) for t in tensors[i::2]] for i in (0, 1))
            sizes = [len(own) for own in rows]
            like = codes[0].new_empty(0, dtype=exact)
            held = room.take(len(codes[0]), sum(sizes), like)
            total = like.new_zeros(())
            ctx.gradients = [like.new_zeros(t.shape) for t in tensors]
            for start in range(0, len(codes[0]), held.shape[1]):
                part = slice(start, min(start + held.shape[1], len(codes[0])))
                logits, found, wanted = held[:, : part.stop - part.start]
                opinion(part, logits, wanted)
                for own, its, out in zip(codes, rows, logits.split(sizes, 1)):
                    multiply(own[part], its, out)
                agreed = torch.mul(wanted, logits, out=found).sum(1)
                if padded:
                    logits[:, PADDING] = -torch.inf
                torch.softmax(logits, 1, out=found)
                # the highest logit's share is one over the normaliser
                total += (logits.amax(1) - found.amax(1).log() - agreed).sum()
                if any(ctx.needs_input_grad[4:]):
                    slopes = found.sub_(wanted).to(_slope_dtype(product, exact)).split(sizes, 1)
                    for j, slope in enumerate(slopes):
                        d_codes, d_rows = ctx.gradients[2 * j : 2 * j + 2]
                        _add_slope(slope, codes[j][part], rows[j], d_codes[part], d_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        return None, None, None, None, *scaled_gradients(ctx, scale, ctx.needs_input_grad[4:])


def multiply(codes: Tensor, rows: Tensor, out: Tensor) -> None:
    """Logits `codes @ rows.T` into `out`, which may have another precision, `[m, k]`."""
    if codes.dtype == rows.dtype == out.dtype:
        torch.mm(codes, rows.T, out=out)
    else:
        out.copy_(codes @ rows.T)


def _slope_dtype(product: torch.dtype, exact: torch.dtype) -> torch.dtype:
    """float16 has no room for the probabilities of rare items."""
    return exact if product == torch.float16 else product


def _add_slope(slope: Tensor, codes: Tensor, rows: Tensor, d_codes: Tensor, d_rows: Tensor) -> None:
    """Add what the gradient of logits, `[m, k]`, gives to those of their codes and rows."""
    codes, rows = codes.to(slope.dtype), rows.to(slope.dtype)
    d_codes += (rows.T @ slope.T).T
    if codes.shape[1] < _FEW_COLUMNS:
        d_rows += (codes.T @ slope).T
    elif slope.dtype == d_rows.dtype:
        d_rows.addmm_(slope.T, codes)
    else:
        d_rows += slope.T @ codes
