"""load_pretrained(): a model out of the folder that save_pretrained wrote."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.backbones import build_host
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.embedding import Block, BlockEmbedding, Int8Block
from cprec_recbole.int8 import fill_from_int8, float_matrices
from cprec_recbole.models import MODELS
from cprec_recbole.partition import Partition
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.saving.folder import read_folder
from cprec_recbole.saving.membership import unpacked_blocks


def load_pretrained(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> CompressedRecommender:
    """Load a model that `save_pretrained` wrote; no data set and no RecBole configuration needed.

    Args:
        folder: what `save_pretrained` was given.
        device: where the model shall be.

    Returns:
        The model in eval mode, with the scores, item ids and tokens that it was saved with.

    Raises:
        CompressionError: no model, one of a newer format, or files that are missing, cut short,
            changed, or do not belong together; the message says which.
    """
    header, weights, tokens = read_folder(folder)
    try:
        model = _built(header, weights)
        model.vocabulary = tokens
        _fill(model, weights, header.get("matrices"))
    except CompressionError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise CompressionError(
            f"Expected the files of {os.fspath(folder)} to belong together, but they do not: "
            f"{type(error).__name__}: {error}"
        ) from error
    if tokens is not None and len(tokens) != model.n_items - 1:
        raise CompressionError(
            f"Expected {model.n_items - 1} tokens in {os.fspath(folder)}, but got {len(tokens)}."
        )
    return model.to(device).eval()


def _built(header: dict[str, Any], weights: dict[str, Tensor]) -> CompressedRecommender:
    """The model that the options describe, its weights not filled in."""
    known = {model.__name__: model for model in MODELS}
    if header["model"] not in known:
        raise CompressionError(
            f"Expected `model` to be one of {', '.join(known)}, but got {header['model']!r}."
        )
    model_class = known[header["model"]]
    record = model_class.record
    compression = CompressionConfig.from_options(header["compression"])
    options = _Options(block_num=1, device="cpu", **header["architecture"])
    n_items = int(header["n_items"])
    plan = compression.plan(record.dim(options[record.size_option]), n_items)
    member = unpacked_blocks(weights["blocks"], len(plan.ranks), n_items)
    sizes = np.bincount(member, minlength=len(plan.ranks))
    if tuple(sizes) != plan.sizes:
        raise CompressionError(
            f"Expected blocks of {list(plan.sizes)} items, but the weights have {sizes.tolist()}."
        )
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and written over
        host = build_host(record, options, _Catalogue(options["ITEM_ID_FIELD"]))
        host.n_items = n_items
        order = np.argsort(member, kind="stable").astype(np.int32)
        partition = Partition(torch.from_numpy(order), plan.cutoffs)
        kind = _block_kind(header.get("rows"))
        table = BlockEmbedding(partition, plan.ranks, plan.dim, kind)
        model = model_class.from_host(host, table, compression, kind)
    model.reads_last_column = bool(header["reads_last_column"])
    return model.to(getattr(torch, header["dtype"]))


def _block_kind(rows: object) -> type[Block]:
    kinds = {None: Block, "int8": Int8Block}
    if rows not in kinds:
        raise CompressionError(f"Expected `rows` to be int8 or left out, but got {rows!r}.")
    return kinds[rows]


@torch.no_grad()
def _fill(model: CompressedRecommender, weights: dict[str, Tensor], matrices: object) -> None:
    if matrices not in (None, "int8"):
        raise CompressionError(f"Expected `matrices` to be int8 or left out, but got {matrices!r}.")
    parameters = {**dict(model.named_parameters()), **model.layer_buffers()}
    names = set(weights) - ({"blocks", "scales"} if matrices else {"blocks"})
    if names != set(parameters):
        missing, strange = sorted(set(parameters) - names), sorted(names - set(parameters))
        raise CompressionError(
            "Expected the weights to be those of the options, but they lack "
            f"{', '.join(missing) or 'nothing'} and have {', '.join(strange) or 'nothing'} besides."
        )
    scales = _scales(model, weights) if matrices else {}
    model.int8_scales = {}
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise CompressionError(
                f"Expected the weight {name} to be {list(parameter.shape)} by the options, but it "
                f"is {list(weights[name].shape)}."
            )
        if name in scales:
            filled = fill_from_int8(parameter, weights[name], scales[name])
            model.int8_scales[name] = filled
            continue
        if parameter.is_floating_point() != weights[name].is_floating_point():
            raise CompressionError(
                f"Expected the weight {name} to be {parameter.dtype} by the options, but it is "
                f"{weights[name].dtype}."
            )
        parameter.copy_(weights[name])


def _scales(model: CompressedRecommender, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scales of each matrix that was kept in int8."""
    rounded = {n: p for n, p in float_matrices(model) if weights[n].dtype == torch.int8}
    return dict(zip(rounded, weights["scales"].split([len(p) for p in rounded.values()])))


class _Options(dict[str, Any]):
    """Options as RecBole's models read them."""

    def __missing__(self, name: str) -> None:
        return None


class _Catalogue:
    """As much of a dataset as a host's constructor asks for."""

    def __init__(self, iid_field: str) -> None:
        self.iid_field = iid_field

    def num(self, field: str) -> int:
        return 1
