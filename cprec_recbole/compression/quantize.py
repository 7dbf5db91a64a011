"""quantize(): a compressed model with its matrices in int8, int4 or both."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, cast

import torch
from torch import nn

from cprec_recbole.config import ROUNDINGS, CompressionError, check_choice
from cprec_recbole.embedding import Block, QuantizedBlock
from cprec_recbole.integers import ROWS_OF, dtypes_of, float_matrices, round_matrix
from cprec_recbole.models.eval_mode import can_be_trained
from cprec_recbole.models.recommender import CompressedRecommender, copied
from cprec_recbole.models.saving import check_finite


@can_be_trained
def quantize(small: nn.Module, dtype: str = "int8") -> CompressedRecommender:
    """A copy of a compressed model with all matrices in int8 or int4, or, `mixed`, with the rows of
    the blocks in int4 and all others in int8.

    The rows of the blocks are so in memory, other matrices in the folder that `save_pretrained`
    writes, biases and norms nowhere. In int8 each row has a scale: an entry is off by at most half
    of it, which is a 127th of the row's largest entry, rounded up to bfloat16. In int4 numbers are
    from -7 to 7, and each column of a block, each row of another matrix has a scale, that of least
    squared error. The new model, in the mode of the old one, cannot be trained, but for `recover`,
    which does so in float.

    Raises:
        CompressionError: RecBole's own model, quantized rows, another precision than float32 or
            float64, weights that are not finite, or another `dtype`.
    """
    check_choice("dtype", dtype, ROUNDINGS)
    if not isinstance(small, CompressedRecommender):
        raise CompressionError(
            f"Expected `small` to be a compressed model, but got {type(small).__name__}; use "
            f'compress(model, ..., dtype="{dtype}"), or compress(model, '
            f'CompressionConfig.uncompressed(), dtype="{dtype}") for {dtype} and nothing else.'
        )
    if small.quantized:
        raise CompressionError(
            f"Expected `small` to have float rows, but its rows are in {small.table.quantized} "
            "already; quantize the model that it was made from."
        )
    check_precision("small", small.table.dtype)
    check_finite("small", small)
    return quantized(copied(small), dtype)


def quantized(
    model: CompressedRecommender, dtype: str, before: CompressedRecommender | None = None
) -> CompressedRecommender:
    """Quantize a model in place; what is still as in the model `before` keeps the very numbers that
    it has there."""
    of_rows, of_others = dtypes_of(dtype)
    model.quantized = dtype
    olds = [] if before is None else [block for each in before.tables for block in each.blocks]
    places = [(table.factors, j) for table in model.tables for j in range(len(table.factors))]
    for (factors, j), old in zip_longest(places, olds):
        factors[j] = quantized_block(cast(Block, factors[j]), of_rows, cast(Any, old))
    matrices = {} if before is None else dict(float_matrices(before))
    for name, matrix in float_matrices(model):
        if name not in matrices or not torch.equal(matrix, matrices[name]):
            model.matrix_scales = {**model.matrix_scales, name: round_matrix(matrix, of_others)}
    return model


def in_float(small: CompressedRecommender) -> CompressedRecommender:
    """A copy of a quantized model whose rows are in float, to be trained."""
    model = copied(small)
    model.quantized = None
    for table in model.tables:
        for j, block in enumerate(table.blocks):
            result = Block(0, 0, 0)
            result.weight, result.projection = nn.Parameter(block.whole()), block.projection
            table.factors[j] = result.requires_grad_().train(block.training)
    return model


def quantized_block(
    block: Block, dtype: str, before: QuantizedBlock | None = None
) -> QuantizedBlock:
    """A block with its rows in int8 or int4, those of the block `before` where nothing changed."""
    if before is not None and torch.equal(before.whole(), block.weight):
        rows = before.rows()
    else:
        rows = ROWS_OF[dtype].of(block.weight.detach())
    return QuantizedBlock(rows, block.projection).train(block.training)


def check_precision(name: str, dtype: torch.dtype) -> None:
    """Refuse a model, given as `name`, whose rows no quantized row stands for."""
    if dtype not in (torch.float32, torch.float64):
        raise CompressionError(
            f"Expected `{name}` to be in float32 or float64 to be quantized, but got "
            f"{dtype}; use {name}.float()."
        )
