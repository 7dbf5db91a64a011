"""A compressed model out of an original's weights, before anything is fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.compression.directions import scoring_importance, tied_importance
from cprec_recbole.compression.original import Original
from cprec_recbole.config import CompressionConfig
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models import MODELS
from cprec_recbole.partition import Partition
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.softmax import TreeSoftmax


def build(
    original: Original,
    compression: CompressionConfig,
    counts: np.ndarray,
    moment: Tensor | None = None,
) -> CompressedRecommender:
    """A compressed model with the original's weights: factors by SVD, shared layers the first of
    each set, clusters the mean of their items, everything else copied.

    Args:
        original: what is compressed; it is left as it was.
        compression: the options.
        counts: training interactions of each item id, `[n_items]`.
        moment: of the original's hidden states, `[d, d]`; None: all directions are equal.
    """
    table = original.table
    plan = compression.plan(original.dim, original.n_items)
    weights = torch.from_numpy(counts).to(table.device)
    blocks = BlockEmbedding(Partition.from_counts(counts, plan.cutoffs), plan.ranks, plan.dim)
    blocks = blocks.to(table.device, table.dtype)
    read = None if moment is None or not compression.tied else tied_importance(moment)
    blocks.approximate(table, weights, read)
    small_class = next(cls for cls in MODELS if cls.record is original.record)
    if compression.training not in original.record.objectives:
        compression = replace(compression, training=original.record.objectives[0])
    small = small_class.from_host(original.copy_host(), blocks, compression)
    small.reads_last_column = original.reads_last_column
    small.train_item_counts = counts
    small.item_tokens = getattr(original.model, "item_tokens", None)
    small.vocabulary = getattr(original.model, "vocabulary", None)
    small.head.to(table.device, table.dtype)
    if small.head.table is not blocks:
        scored = None if moment is None else scoring_importance(moment)
        small.head.table.approximate(table, weights, scored)
    if isinstance(small.head, TreeSoftmax):
        small.head.average_clusters(weights)
    return small
