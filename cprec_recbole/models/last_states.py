"""The last hidden states of RecBole's models, without what nobody reads.

Equal to the last of all states but for rounding, in training too, with the same gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cprec_recbole.models.item_tables import RecBoleModel
from cprec_recbole.models.spec import pick
from cprec_recbole.partition import PADDING

_UNSEEN = -10000.0  # what RecBole adds to the scores of positions that are not seen
_ROWS = 32  # of a batch that convolutions read at a time: their copies stay in the cache


def transformer_last(
    encoder: RecBoleModel, inputs: Tensor, item_seq: Tensor, lengths: Tensor, *, is_causal: bool
) -> Tensor:
    """Of RecBole's TransformerEncoder, `[B, L, d], [B, L], [B] -> [B, d]`: the top layer reads all
    positions, for the last one alone."""
    n_rows, n_columns = item_seq.shape
    seen = torch.where(item_seq != PADDING, 0.0, _UNSEEN).to(inputs.dtype)[:, None, None]
    below = seen
    if is_causal:
        later = torch.full((n_columns, n_columns), _UNSEEN, device=inputs.device).triu(1)
        below = seen + later.to(inputs.dtype)
    states = inputs.flatten(0, 1)
    *layers, top = encoder.layer
    for layer in layers:
        states = _transformed(layer, n_rows, states, states, below)
    rows = torch.arange(n_rows, device=inputs.device) * n_columns + lengths - 1
    return _transformed(top, n_rows, states.index_select(0, rows), states, seen)


def _transformed(layer: Any, n_rows: int, queries: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
    """What RecBole's TransformerLayer makes of some positions of each row, `[B * Q, d],
    [B * L, d] -> [B * Q, d]`, given what is added to their scores, `[B, 1, Q, L]`."""
    attention, feed_forward = layer.multi_head_attention, layer.feed_forward
    size = attention.attention_head_size
    query, key, value = (
        each.view(n_rows, -1, attention.num_attention_heads, size).transpose(1, 2)
        for each in (attention.query(queries), attention.key(inputs), attention.value(inputs))
    )
    dropout = attention.attn_dropout.p if attention.attn_dropout.training else 0.0
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=size**-0.5
    )
    context = attention.dense(context.transpose(1, 2).reshape(queries.shape))
    hidden = attention.LayerNorm(attention.out_dropout(context) + queries)
    activation = feed_forward.intermediate_act_fn
    inner = feed_forward.dense_1(hidden)
    inner = F.gelu(inner) if activation == feed_forward.gelu else activation(inner)
    return feed_forward.LayerNorm(feed_forward.dropout(feed_forward.dense_2(inner)) + hidden)


def nextitnet_last(model: RecBoleModel, item_seq: Tensor, lengths: Tensor) -> Tensor:
    """Of NextItNet, `[B, L], [B] -> [B, d]`: the cone of positions that the last ones see, each
    convolution one product."""
    first, width = int(lengths.min()) - 1, int(item_seq.shape[1])
    plan = _cone(first, width, tuple(model.dilations), model.kernel_size, item_seq.device)
    kernels = [
        [c.weight.squeeze(2).transpose(1, 2).flatten(1) for c in (block.conv1, block.conv2)]
        for block in model.residual_blocks  # [d, kernel * d]
    ]
    if item_seq.device.type != "cpu" or torch.jit.is_tracing():
        states = pick(_cone_states(model, item_seq, plan, kernels), lengths - first)
    else:
        parts = zip(item_seq.split(_ROWS), lengths.split(_ROWS))
        states = torch.cat(
            [pick(_cone_states(model, rows, plan, kernels), ends - first) for rows, ends in parts]
        )
    return model.final_layer(states)


def _cone_states(
    model: RecBoleModel, item_seq: Tensor, plan: list[_Reads], kernels: list[list[Tensor]]
) -> Tensor:
    states = model.item_embedding(item_seq)
    for block, reads, (one, two) in zip(model.residual_blocks, plan, kernels):
        inner = _convolved(states, reads.first, one, block.conv1.bias)
        inner = _convolved(block.ln1(inner).relu(), reads.second, two, block.conv2.bias)
        states = block.ln2(inner).relu() + states.index_select(1, reads.added)
    return states


def _convolved(states: Tensor, taps: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    read = F.pad(states, (0, 0, 1, 0)).index_select(1, taps)
    convolved = F.linear(read.view(-1, kernel.shape[1]), kernel, bias)
    return convolved.view(-1, taps.numel() * kernel.shape[0] // kernel.shape[1], kernel.shape[0])


class _Reads(NamedTuple):
    """What a residual block reads."""

    first: Tensor  # the rows of `[zeros, input]` under each tap of the first convolution
    second: Tensor  # and of the second
    added: Tensor  # the rows of the input that are added


@lru_cache(maxsize=256)
def _cone(
    first: int, width: int, dilations: tuple[int, ...], kernel: int, device: torch.device
) -> list[_Reads]:
    """What each residual block reads for the positions from `first` on."""
    wanted, plan = list(range(first, width)), []
    for dilation in reversed(dilations):
        middle = _read(wanted, 2 * dilation, kernel)
        given = sorted({*_read(middle, dilation, kernel), *wanted})
        plan.append(
            _Reads(
                _taps(middle, given, dilation, kernel).to(device),
                _taps(wanted, middle, 2 * dilation, kernel).to(device),
                torch.tensor([given.index(position) for position in wanted], device=device),
            )
        )
        wanted = given
    return plan[::-1]


def _read(positions: list[int], dilation: int, kernel: int) -> list[int]:
    """The positions that a causal convolution reads for some, rising."""
    read = {position - tap * dilation for position in positions for tap in range(kernel)}
    return sorted(position for position in read if position >= 0)


def _taps(positions: list[int], given: list[int], dilation: int, kernel: int) -> Tensor:
    """The rows of `[zeros, given]` under each tap for some positions, one after the other."""
    rows = {position: row for row, position in enumerate(given, start=1)}
    shifts = [tap * dilation for tap in reversed(range(kernel))]
    return torch.tensor([rows.get(position - s, 0) for position in positions for s in shifts])
