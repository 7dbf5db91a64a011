"""quantize(): a compressed model with its matrices in int8."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.int8.matrices import float_matrices, round_to_int8
from cprec_recbole.int8.rows import Int8Block
from cprec_recbole.models.eval_mode import can_be_trained
from cprec_recbole.models.recommender import CompressedRecommender

DTYPES = ("int8",)


@can_be_trained
def quantize(small: nn.Module) -> CompressedRecommender:
    """A copy of a compressed model with all matrices in int8, a scale for each row.

    The rows of the blocks are so in memory; the matrices of layers, projections and a tree's
    clusters are rounded, computed in float, and in int8 in the folder that `save_pretrained`
    writes. Biases and norms stay in float. Lossy: an entry of a row is off by at most half of the
    row's scale, which is a 127th of its largest entry, rounded up to bfloat16. Everything that is
    exact about a model (top-k, saving, loading) is exact about the new one; it cannot be trained,
    but for `recover`, which does so in float.

    Args:
        small: a Cp model in float32 or float64; it is left as it was.

    Returns:
        The new model, in the mode of the old one. It shares its tokens and counts.

    Raises:
        CompressionError: RecBole's own model, rows in int8 already, another precision, weights that
            are not finite or are spread over processes.
    """
    result = _copied(_checked(small))
    for table in _tables(result):
        for j, block in enumerate(table.blocks):
            table.factors[j] = Int8Block.of(block)
    result.int8_scales = {name: round_to_int8(p) for name, p in float_matrices(result)}
    return result.train(result.training)


@contextmanager
def in_float(small: CompressedRecommender) -> Iterator[Callable[[], CompressedRecommender]]:
    """While it lasts, a model's rows are in float, to be trained; then those that were in int8 are
    so again, and what was rounded is again. What was not changed keeps its very numbers.

    Gives a function for the model as it would be by then: a copy, or the model itself where it is
    in float anyway.
    """
    if not small.table.is_int8:
        yield lambda: small
        return
    before = _Numbers(small)
    try:
        for table in _tables(small):
            for j, block in enumerate(table.blocks):
                table.factors[j] = cast(Int8Block, block).in_float()
        yield lambda: before.back_in(_copied(small))
    finally:
        before.back_in(small)


class _Numbers:
    """What a model in int8 consists of."""

    def __init__(self, model: CompressedRecommender) -> None:
        self.blocks = [table.blocks for table in _tables(model)]
        self.matrices = {name: p.detach().clone() for name, p in float_matrices(model)}

    def back_in(self, model: CompressedRecommender) -> CompressedRecommender:
        """Bring a model, whose rows are in float meanwhile, back to int8: the model that this is
        of, or a copy of it."""
        for table, blocks in zip(_tables(model), self.blocks):
            for j, (block, trained) in enumerate(zip(blocks, table.blocks)):
                if trained is block:
                    continue
                same = _same(cast(Int8Block, block).in_float(), trained)
                # a copy of the block, for matrices are rounded where they are
                table.factors[j] = copy.deepcopy(block) if same else Int8Block.of(trained)
                table.factors[j].train(trained.training)
        for name, matrix in float_matrices(model):
            if not torch.equal(matrix, self.matrices[name]):
                model.int8_scales = {**model.int8_scales, name: round_to_int8(matrix)}
        return model


def _copied(model: CompressedRecommender) -> CompressedRecommender:
    """A copy that shares tokens and counts."""
    known = (model.vocabulary, model.item_tokens, model.train_item_counts)
    memo: dict[int, Any] = {id(each): each for each in known if each is not None}
    return copy.deepcopy(model, memo)


def check_dtype(dtype: object, of_model: torch.dtype) -> None:
    """Raise a CompressionError unless rows can be kept as `dtype`: `"int8"`, or None for float."""
    if dtype is None:
        return
    if dtype not in DTYPES:
        raise CompressionError(
            f'Expected `dtype` to be "int8", or left out for float rows, but got {dtype!r}.'
        )
    _check_precision("model", of_model)


def _tables(model: CompressedRecommender) -> list[BlockEmbedding]:
    """The table that is looked up and, where it is another, the softmax's."""
    return list({id(table): table for table in (model.table, model.softmax.table)}.values())


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values())
    return all(torch.equal(mine, others) for mine, others in pairs)


def _checked(small: nn.Module) -> CompressedRecommender:
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
    _check_precision("small", small.table.dtype)
    for name, parameter in small.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CompressionError(
                f"Expected `small` to have finite weights, but {name} has NaN or inf."
            )
    return small


def _check_precision(name: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise CompressionError(
            f"Expected `{name}` to be in float32 or float64 to put its rows in int8, but got "
            f"{dtype}; use {name}.float()."
        )
