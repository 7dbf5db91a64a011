"""quantize(): a compressed model with its matrices in int8."""

from __future__ import annotations

from itertools import zip_longest
from typing import cast

import torch
from torch import nn

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import Block, Int8Block
from cprec_recbole.int8 import float_matrices, quantized_rows, round_to_int8
from cprec_recbole.models.eval_mode import can_be_trained
from cprec_recbole.models.recommender import CompressedRecommender, copied
from cprec_recbole.models.saving import check_finite


@can_be_trained
def quantize(small: nn.Module) -> CompressedRecommender:
    """A copy of a compressed model with all matrices in int8, a scale for each row.

    The rows of the blocks are so in memory, other matrices in the folder that `save_pretrained`
    writes, biases and norms nowhere. An entry of a row is off by at most half of the row's scale,
    which is a 127th of its largest entry, rounded up to bfloat16. The new model, in the mode of the
    old one, cannot be trained, but for `recover`, which does so in float.

    Raises:
        CompressionError: RecBole's own model, rows in int8 already, another precision than float32
            or float64, or weights that are not finite.
    """
    if not isinstance(small, CompressedRecommender):
        raise CompressionError(
            f"Expected `small` to be a compressed model, but got {type(small).__name__}; use "
            'compress(model, ..., dtype="int8"), or compress(model, '
            'CompressionConfig.uncompressed(), dtype="int8") for int8 rows and nothing else.'
        )
    if small.table.is_int8:
        raise CompressionError(
            "Expected `small` to have float rows, but its rows are in int8 already; quantize the "
            "model that it was made from."
        )
    check_precision("small", small.table.dtype)
    check_finite("small", small)
    return to_int8(copied(small))


def to_int8(
    model: CompressedRecommender, before: CompressedRecommender | None = None
) -> CompressedRecommender:
    """Put a model's rows in int8 and round its other matrices, in place; what is still as in the
    model `before` keeps the very numbers that it has there."""
    olds = [] if before is None else [block for each in before.tables for block in each.blocks]
    places = [(table.factors, j) for table in model.tables for j in range(len(table.factors))]
    for (factors, j), old in zip_longest(places, olds):
        factors[j] = int8_block(cast(Block, factors[j]), cast(Int8Block | None, old))
    matrices = {} if before is None else dict(float_matrices(before))
    for name, matrix in float_matrices(model):
        if name not in matrices or not torch.equal(matrix, matrices[name]):
            model.int8_scales = {**model.int8_scales, name: round_to_int8(matrix)}
    return model


def in_float(small: CompressedRecommender) -> CompressedRecommender:
    """A copy of a model in int8 whose rows are in float, to be trained."""
    model = copied(small)
    for table in model.tables:
        for j, block in enumerate(table.blocks):
            result = Block(0, 0, 0)
            result.weight, result.projection = nn.Parameter(block.whole()), block.projection
            table.factors[j] = result.requires_grad_().train(block.training)
    return model


def int8_block(block: Block, before: Int8Block | None = None) -> Int8Block:
    """A block with its rows in int8, those of the block `before` where nothing changed."""
    result = Int8Block(0, 0, 0)
    result.projection = block.projection
    if before is not None and torch.equal(before.whole(), block.weight):
        result.put(before.weight.detach(), before.scale)
    else:
        result.put(*quantized_rows(block.weight.detach()))
    return result.requires_grad_(False).train(block.training)


def check_precision(name: str, dtype: torch.dtype) -> None:
    """Refuse a model, given as `name`, whose rows no int8 row stands for."""
    if dtype not in (torch.float32, torch.float64):
        raise CompressionError(
            f"Expected `{name}` to be in float32 or float64 to put its rows in int8, but got "
            f"{dtype}; use {name}.float()."
        )
