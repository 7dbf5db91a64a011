"""compress(): the one verb. Everything is checked first; then a new model is made."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cprec_recbole.backbones import Host, find_backbone
from cprec_recbole.config import CompressionConfig, CompressionError, reject_unknown
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models import MODELS, CompressedRecommender, check_objective
from cprec_recbole.partition import Partition
from cprec_recbole.sequences import item_counts as count_items
from cprec_recbole.softmax import TreeSoftmax


def compress(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    item_counts: Any = None,
    **options: Any,
) -> CompressedRecommender:
    """Make a compressed copy of a RecBole NextItNet, SASRec or GRU4Rec, fresh or trained.

    The model itself is left as it was. Weights are carried over: the factors are the truncated
    SVD of each block of the table (rows weighted by item counts), kernels that will be shared
    start from the mean of those they replace, everything else is copied. With nothing to lose
    (`ranks=[d]`, `sharing="none"`, `softmax="full"`) the scores equal the original's.

    Args:
        model: RecBole's NextItNet, SASRec or GRU4Rec.
        config: the options as one object; or name them one by one instead, e.g.
            `compress(model, ranks=[64, 16, 4], sharing="cross_block")`. See CompressionConfig for
            `ranks`, `cutoffs`, `sharing`, `softmax` and `tied`. The result reads a history as the
            model does, whatever the object's `training`; how it is trained on is the loader's.
        item_counts: how often each item occurs in training: a RecBole dataset (the training
            split), or an array `[n_items]`. May be left out for a model that was built after
            `import cprec_recbole`, which remembers them.

    Returns:
        CpNextItNet, CpSASRec or CpGRU4Rec, on the model's device and in its train or eval mode.

    Raises:
        CompressionError: a model that is not supported or is compressed already, an option that
            is unknown or breaks a rule, counts that are missing or do not fit.
    """
    if isinstance(model, CompressedRecommender):
        raise CompressionError(
            f"Expected `model` to be uncompressed, but got {type(model).__name__}; compress the "
            "original model with the new options."
        )
    record = find_backbone(model)
    if not isinstance(model.item_embedding, nn.Embedding):
        raise CompressionError(
            f"Expected `model` to have its own item table, but this {type(model).__name__} has a "
            f"{type(model.item_embedding).__name__}: it is a part of a compressed model."
        )
    compression = _options(config, options)
    check_objective(compression, str(model.loss_type))
    table: Tensor = model.item_embedding.weight
    n_items, dim = table.shape
    plan = compression.plan(dim, n_items)
    counts = _checked_counts(item_counts, model, n_items)
    if not torch.isfinite(table).all():
        raise CompressionError(
            "Expected `model` to have finite weights, but its table has NaN or inf."
        )

    weights = torch.from_numpy(counts).to(table.device)
    blocks = BlockEmbedding(Partition.from_counts(counts, plan.cutoffs), plan.ranks, dim)
    blocks = blocks.to(table.device, table.dtype)
    blocks.approximate(table, weights)
    small_class = next(cls for cls in MODELS if cls.record is record)
    small = small_class.from_host(_copy_without_table(model), blocks, compression, counts)
    small.head.to(table.device, table.dtype)
    if small.head.table is not blocks:
        small.head.table.approximate(table, weights)
    if isinstance(small.head, TreeSoftmax):
        small.head.average_clusters(weights)
    return small.train(model.training)


def _options(config: CompressionConfig | None, options: dict[str, Any]) -> CompressionConfig:
    if config is None:
        names = [name for name in CompressionConfig.option_names() if name != "training"]
        reject_unknown(options, names)
        return CompressionConfig(**options)
    if not isinstance(config, CompressionConfig):
        raise CompressionError(
            f"Expected `config` to be a CompressionConfig, but got {type(config).__name__}; name "
            "options one by one, as in compress(model, ranks=[64, 16, 4])."
        )
    if options:
        raise CompressionError(
            f"Expected `config` or options by name, but got both: config and {', '.join(options)}; "
            "use dataclasses.replace(config, ...)."
        )
    return config


def _checked_counts(item_counts: Any, model: nn.Module, n_items: int) -> np.ndarray:
    if item_counts is None:
        item_counts = getattr(model, "train_item_counts", None)
        if item_counts is None:
            raise CompressionError(
                "Expected `item_counts` for a model that was built before `import cprec_recbole`, "
                "but got none; pass the training dataset or an array [n_items]."
            )
    if hasattr(item_counts, "inter_feat"):
        item_counts = count_items(item_counts)
    elif isinstance(item_counts, Tensor):
        item_counts = item_counts.detach().cpu().double().numpy()
    try:
        counts = np.array(item_counts, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CompressionError(
            f"Expected `item_counts` to be a RecBole dataset or numbers [{n_items}], but got "
            f"{type(item_counts).__name__}."
        ) from error
    if counts.shape != (n_items,):
        raise CompressionError(
            f"Expected `item_counts` to have one entry for each of the {n_items} items (padding "
            f"included), but got shape {list(counts.shape)}."
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise CompressionError(
            "Expected `item_counts` to be zero or above, but got negative or non-finite entries."
        )
    return counts


def _copy_without_table(model: nn.Module) -> Host:
    """A deep copy of a model in which the item table is missing, never copied."""
    return copy.deepcopy(model, memo={id(model.item_embedding): None})
