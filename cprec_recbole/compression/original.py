"""What is compressed: RecBole's own model, or a Cp model that has not been compressed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cprec_recbole.compression.histories import dataset_of, sample
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.data.sequences import item_counts as count_items
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models import class_of, spec_of
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.item_tables import RecBoleModel
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.saving import check_finite
from cprec_recbole.models.spec import Encoder, ModelSpec, Parts
from cprec_recbole.partition import PADDING, Partition
from cprec_recbole.softmax import TreeSoftmax

_MOST_OFTEN = 2**53  # an item's count: up to here a float holds every whole number
# share of the moment in what an error costs (docs/compressing.md, "The start")
_TIED = 0.5
_UNTIED = 0.9  # nothing reads this table; the rest is for what these histories do not show
_HISTORIES, _BATCH = 2048, 128


@dataclass(frozen=True)
class Original:
    """One view of both kinds of model; nothing of the model is copied or changed."""

    model: nn.Module
    inner: RecBoleModel  # for a Cp model the one inside
    spec: ModelSpec
    table: Tensor  # item vectors in id order, [n_items, d], without a gradient
    reads_last_column: bool  # it predicts from that of a padded batch, even from padding
    dtype: torch.dtype  # in which the model was given

    @classmethod
    def of(cls, model: nn.Module) -> Original:
        """See a model as an original; a CompressionError where it is not supported, is compressed,
        is a part of another, or has weights that are not finite."""
        if isinstance(model, CompressedRecommender):
            options = model.compression
            layers, sets = model.spec.sharing(model.inner, options.sharing)
            is_whole = set(model.table.ranks) == {model.table.dim} and len(sets) == len(layers)
            dtype = model.table.quantized
            if not is_whole or options.softmax != "full" or not options.tied or dtype:
                how = f"in {dtype}" if dtype else "compressed"
                raise CompressionError(
                    f"Expected `model` to be uncompressed, but got {type(model).__name__}, which "
                    f"is {how}; compress the original model with the new options."
                )
            inner, spec, last_column = model.inner, model.spec, model.reads_last_column
            table = model.table.dense().detach()
        else:
            inner, spec = model, spec_of(model)
            if not isinstance(inner.item_embedding, nn.Embedding):
                raise CompressionError(
                    f"Expected `model` to have its own item table, but this {type(model).__name__} "
                    "is a part of a compressed model."
                )
            table, last_column = spec.table.vectors(inner), spec.reads_last_column
        check_finite("model", model)
        return cls(model, inner, spec, table, last_column, table.dtype)

    def in_float(self) -> Original:
        """Of a model in half precision, a copy in float32: RecBole's layers mix types there, and
        fits of small steps would be lost. Of any other, itself."""
        if self.dtype in (torch.float32, torch.float64):
            return self
        return replace(Original.of(copy.deepcopy(self.model).float()), dtype=self.dtype)

    @property
    def n_items(self) -> int:
        """Items of the catalogue, padding included."""
        return len(self.table)

    @property
    def dim(self) -> int:
        """Size `d` of an item vector."""
        return self.table.shape[1]

    @property
    def encoder(self) -> Encoder:
        """The hidden states that the model predicts from."""
        return Encoder(self.spec, self.inner, self.reads_last_column)

    def counts(self, item_counts: Any = None) -> np.ndarray:
        """Training interactions of each item id, `[n_items]`: of a RecBole dataset, of numbers
        `[n_items]` or what the model knows; a CompressionError where they do not fit."""
        if item_counts is None:
            item_counts = getattr(self.model, "train_item_counts", None)
        if item_counts is None:
            raise CompressionError(
                "Expected `item_counts` for a model that was loaded from a folder, or built before "
                "`import cprec_recbole`, but got none; pass the training dataset or an array "
                "[n_items]."
            )
        dataset = dataset_of(item_counts)
        if dataset is not None:
            item_counts = count_items(dataset)
        elif isinstance(item_counts, Tensor):
            item_counts = item_counts.detach().cpu().double().numpy()
        try:
            counts = np.array(item_counts, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise CompressionError(
                f"Expected `item_counts` to be a RecBole dataset or numbers [{self.n_items}], but "
                f"got {type(item_counts).__name__}."
            ) from error
        if counts.shape != (self.n_items,):
            raise CompressionError(
                f"Expected `item_counts` to have one entry for each of the {self.n_items} items "
                f"(padding included), but got shape {list(counts.shape)}."
            )
        wrong = ~((counts >= 0) & (counts <= _MOST_OFTEN))
        if wrong.any():
            item = int(wrong.argmax())
            raise CompressionError(
                "Expected `item_counts` to be zero or above and at most 2^53, but got "
                f"{counts[item]:g} for item {item}."
            )
        counts[PADDING] = 0  # padding is no item, however often lists are padded
        if (counts % 1).any() and counts.max() <= 1:
            raise CompressionError(
                "Expected `item_counts` to be how often each item occurs, but got shares such as "
                f"{counts.max():g}; multiply them by the number of interactions."
            )
        return counts

    def compressed(
        self, compression: CompressionConfig, counts: np.ndarray, moment: Tensor | None = None
    ) -> CompressedRecommender:
        """A compressed model with the original's weights, nothing fitted: factors by the SVD of
        each block, weighted by counts `[n_items]` and the moment `[d, d]` of the hidden states; of
        shared layers the first of each set, clusters the mean of their items."""
        if compression.training not in self.spec.objectives:
            compression = replace(compression, training=self.spec.objectives[0])
        plan = compression.plan(self.dim, self.n_items)
        partition = Partition.from_counts(counts, plan.cutoffs)
        weights = torch.from_numpy(counts).to(self.table.device)

        def table_for(importance: Tensor | None) -> BlockEmbedding:
            table = BlockEmbedding(partition, plan.ranks, plan.dim)
            table.to(self.table.device, self.table.dtype)
            table.approximate(self.table, weights, importance)
            return table

        if compression.tied:
            table = softmax_table = table_for(importance_of(moment, tied=True))
        else:  # what only the layers read may be read along any direction
            table, softmax_table = table_for(None), table_for(importance_of(moment, tied=False))
        # a deep copy without its item table and what is known of its items
        known = (*self.spec.table.holds, "train_item_counts", "item_tokens", "vocabulary")
        left_out = [getattr(self.inner, name, None) for name in known]
        inner = copy.deepcopy(self.inner, memo={id(each): None for each in left_out})
        inner.item_embedding = self.spec.table.look_up(self.inner, None)
        inner.requires_grad_(True)  # also what was frozen in the original
        parts = Parts(inner, table, softmax_table, compression, self.reads_last_column, counts)
        small = class_of(self.spec)(parts=parts)
        small.item_tokens = getattr(self.model, "item_tokens", None)
        small.vocabulary = getattr(self.model, "vocabulary", None)
        small.softmax.to(self.table.device, self.table.dtype)
        if isinstance(small.softmax, TreeSoftmax):
            small.softmax.average_clusters(weights)
        return small


@torch.no_grad()
def hidden_moment(original: Original, histories: Tensor) -> Tensor | None:
    """Second moment of an original's hidden states over some histories `[N, L]`, scaled to a mean
    eigenvalue of 1, `[d, d]` in float64. None where the states are all zero or not finite."""
    some = sample(histories, _HISTORIES, torch.Generator().manual_seed(0))
    moment = torch.zeros(original.dim, original.dim, dtype=torch.float64).to(original.table.device)
    with in_eval_mode(original.model):
        for batch in some.to(moment.device).split(_BATCH):
            states = original.encoder.all_states(batch).double()
            moment += states.T @ states
    mean = moment.trace() / original.dim
    return moment / mean if mean > 0 and torch.isfinite(moment).all() else None


def importance_of(moment: Tensor | None, *, tied: bool) -> Tensor | None:
    """What an error of an item's vector costs, as a quadratic form `[d, d]`; None without a moment.
    Across the hidden states it costs no score, but layers that read the vectors too (`tied`)."""
    if moment is None:
        return None
    share = _TIED if tied else _UNTIED
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return share * moment + (1 - share) * identity
