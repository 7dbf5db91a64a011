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
    n_rows, is_traced = len(item_seq), torch.jit.is_tracing()
    seen = torch.where(item_seq != PADDING, 0.0, _UNSEEN).to(inputs.dtype)[:, None, None]
    # where it is causal, padding is behind all that is read
    below = None if is_causal else seen.expand(-1, -1, item_seq.shape[1], -1)
    states = inputs if is_traced else inputs.flatten(0, 1)  # which is fewer operations
    *layers, top = encoder.layer
    for layer in layers:
        states = _transformed(layer, n_rows, states, states, below)
    if is_traced:
        last = pick(states, lengths).unsqueeze(1)
        return _transformed(top, n_rows, last, states, seen).squeeze(1)
    return _transformed(top, n_rows, pick(states.view(inputs.shape), lengths), states, seen)


def _transformed(
    layer: Any, n_rows: int, queries: Tensor, inputs: Tensor, mask: Tensor | None
) -> Tensor:
    """What RecBole's TransformerLayer makes of some positions of each row, `[B * Q, d],
    [B * L, d] -> [B * Q, d]` or with B and Q apart, given what is added to their scores,
    `[B, 1, Q, L]`; None where each sees those up to its own."""
    attention, feed_forward = layer.multi_head_attention, layer.feed_forward
    states = attention.query(queries), attention.key(inputs), attention.value(inputs)
    dropout = attention.attn_dropout.p if attention.attn_dropout.training else 0.0
    attend = _GraphAttention.apply if torch.jit.is_tracing() else _attention
    context = attend(*states, mask, n_rows, attention.num_attention_heads, dropout)
    context = attention.dense(context)
    hidden = attention.LayerNorm(attention.out_dropout(context) + queries)
    activation = feed_forward.intermediate_act_fn
    inner = feed_forward.dense_1(hidden)
    inner = F.gelu(inner) if activation == feed_forward.gelu else activation(inner)
    return feed_forward.LayerNorm(feed_forward.dropout(feed_forward.dense_2(inner)) + hidden)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *sizes: Any
) -> Tensor:
    """Attention of several heads, of states as `_transformed` has them."""
    n_rows, n_heads, dropout = sizes
    query_, key_, value_ = (
        each.view(n_rows, -1, n_heads, query.shape[-1] // n_heads).transpose(1, 2)
        for each in (query, key, value)
    )
    context = F.scaled_dot_product_attention(
        query_, key_, value_, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
    )
    return context.transpose(1, 2).reshape(query.shape)


class _GraphAttention(torch.autograd.Function):
    """The same; in a graph one node of onnxruntime in place of a dozen."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """See _attention."""
        return _attention(*arguments)

    @staticmethod
    def symbolic(
        graph: Any, query: Any, key: Any, value: Any, mask: Any, _: Any, n_heads: int, dropout: Any
    ) -> Any:
        """The node."""
        inputs = [query, key, value]
        if mask is not None:
            nothing = graph.op("prim::Constant")
            nothing.setType(torch.OptionalType.ofTensor())
            inputs += [nothing, nothing, mask]
        kind = {"num_heads_i": n_heads, "unidirectional_i": int(mask is None)}
        node = graph.op("com.microsoft::MultiHeadAttention", *inputs, **kind)
        node.setType(query.type())
        return node


def nextitnet_last(model: RecBoleModel, item_seq: Tensor, lengths: Tensor) -> Tensor:
    """Of NextItNet, `[B, L], [B] -> [B, d]`: the cone of positions that the last ones see, each
    convolution one product."""
    first, width = int(lengths.min()) - 1, int(item_seq.shape[1])
    plan = _cone(first, width, tuple(model.dilations), model.kernel_size, item_seq.device)
    kernels = [
        [c.weight.squeeze(2).transpose(1, 2).flatten(1) for c in (block.conv1, block.conv2)]
        for block in model.residual_blocks  # [d, kernel * d]
    ]
    parts = [(item_seq, lengths)]
    if item_seq.device.type == "cpu" and not torch.jit.is_tracing():
        parts = list(zip(item_seq.split(_ROWS), lengths.split(_ROWS)))
    states = [pick(_cone_states(model, rows, plan, kernels), ends - first) for rows, ends in parts]
    return model.final_layer(states[0] if len(states) == 1 else torch.cat(states))


def _cone_states(
    model: RecBoleModel, item_seq: Tensor, plan: list[_Reads], kernels: list[list[Tensor]]
) -> Tensor:
    states = model.item_embedding(item_seq)
    for block, reads, (one, two) in zip(model.residual_blocks, plan, kernels):
        inner = _convolved(states, reads.first, one, block.conv1.bias)
        inner = _convolved(block.ln1(inner).relu(), reads.second, two, block.conv2.bias)
        states = block.ln2(inner).relu() + states.index_select(1, reads.added)
    return states


def _convolved(states: Tensor, taps: _Taps, kernel: Tensor, bias: Tensor) -> Tensor:
    if taps.pads:
        states = F.pad(states, (0, 0, 1, 0))
    read = states.index_select(1, taps.rows)
    convolved = F.linear(read.view(-1, kernel.shape[1]), kernel, bias)
    n_states = taps.rows.numel() * kernel.shape[0] // kernel.shape[1]
    return convolved.view(-1, n_states, kernel.shape[0])


class _Taps(NamedTuple):
    """What a convolution reads."""

    rows: Tensor  # under each tap, `[positions * kernel]`
    pads: bool  # whether row 0 is a row of zeros, before all others


class _Reads(NamedTuple):
    """What a residual block reads."""

    first: _Taps
    second: _Taps
    added: Tensor  # the rows of the input that are added


@lru_cache(maxsize=256)
def _cone(
    first: int, width: int, dilations: tuple[int, ...], kernel: int, device: torch.device
) -> list[_Reads]:
    """What each residual block reads for the positions from `first` on."""
    wanted, plan = list(range(first, width)), []
    for dilation in reversed(dilations):
        middle = sorted({each for each in _under(wanted, 2 * dilation, kernel) if each >= 0})
        given = sorted({each for each in _under(middle, dilation, kernel) if each >= 0} | {*wanted})
        added = torch.tensor([given.index(position) for position in wanted], device=device)
        one = _taps(_under(middle, dilation, kernel), given, device)
        two = _taps(_under(wanted, 2 * dilation, kernel), middle, device)
        plan.append(_Reads(one, two, added))
        wanted = given
    return plan[::-1]


def _under(positions: list[int], dilation: int, kernel: int) -> list[int]:
    """The positions under the taps of a causal convolution, those of each beside each other."""
    shifts = [tap * dilation for tap in reversed(range(kernel))]
    return [position - shift for position in positions for shift in shifts]


def _taps(read: list[int], given: list[int], device: torch.device) -> _Taps:
    """The rows of `given` for some positions."""
    pads = min(read) < 0
    number = {position: row for row, position in enumerate(given, start=int(pads))}
    return _Taps(torch.tensor([number.get(each, 0) for each in read], device=device), pads)
