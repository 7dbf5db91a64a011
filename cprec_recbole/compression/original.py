"""What is compressed: RecBole's own model, or a Cp model that has not been compressed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cprec_recbole.backbones import Backbone, Reading
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.data.sequences import item_counts as count_items
from cprec_recbole.item_tables import Host
from cprec_recbole.partition import PADDING
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.records import find_backbone
from cprec_recbole.sharing import sharing_plan, sharing_sets

_MOST_OFTEN = 2**53  # an item's count: up to here a float holds every whole number


@dataclass(frozen=True)
class Original:
    """One view of both kinds of model; nothing of the model is copied or changed.

    Attributes:
        model: the model itself.
        record: what compression knows of its kind.
        host: RecBole's model; for a Cp model its backbone.
        table: item vectors in id order, `[n_items, d]`, without a gradient.
        reads_last_column: it predicts from the last column of a padded batch, even from padding.
        dtype: the precision in which the model was given.
    """

    model: nn.Module
    record: Backbone
    host: Host
    table: Tensor
    reads_last_column: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Original:
        """See a model as an original.

        Raises:
            CompressionError: a model that is not supported, is compressed, is a part of another,
                or has weights that are not finite.
        """
        if isinstance(model, CompressedRecommender):
            original = cls._of_uncompressed(model)
        else:
            record = find_backbone(model)
            if not isinstance(model.item_embedding, nn.Embedding):
                raise CompressionError(
                    f"Expected `model` to have its own item table, but this {type(model).__name__} "
                    f"has a {type(model.item_embedding).__name__}: it is a part of a compressed "
                    "model."
                )
            table = record.table.vectors(model)
            original = cls(model, record, model, table, record.reads_last_column, table.dtype)
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise CompressionError(
                    f"Expected `model` to have finite weights, but {name} has NaN or inf."
                )
        return original

    @classmethod
    def _of_uncompressed(cls, model: CompressedRecommender) -> Original:
        if model.table.is_int8:
            raise CompressionError(
                "Expected `model` to have float rows, but its rows are in int8; compress the model "
                "that it was made from."
            )
        options = model.compression
        plain = CompressionConfig.uncompressed(options.training)
        whole = set(model.table.ranks) == {model.table.dim}
        layers = model.record.layers(model.backbone)
        sets = sharing_sets(layers, sharing_plan(options.sharing, len(layers), model.record.group))
        if not (whole and options.softmax == plain.softmax and options.tied == plain.tied) or (
            len(sets) != len(layers)
        ):
            raise CompressionError(
                f"Expected `model` to be uncompressed, but got {type(model).__name__}, which is "
                "compressed; compress the original model with the new options."
            )
        table = model.table.dense().detach()
        return cls(model, model.record, model.backbone, table, model.reads_last_column, table.dtype)

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
    def reading(self) -> Reading:
        """The host and the hidden states that it predicts from."""
        return Reading(self.record, self.host, self.reads_last_column)

    def hidden_states(self, item_seq: Tensor) -> Tensor:
        """Hidden state at every position, `[B, L] -> [B, L, d]`, for models that have them."""
        return self.reading.everywhere(item_seq)

    def counts(self, item_counts: Any = None) -> np.ndarray:
        """Training interactions of each item id, `[n_items]`.

        Args:
            item_counts: a RecBole dataset, numbers `[n_items]`, or None for what the model knows.

        Raises:
            CompressionError: none are known, or they do not fit.
        """
        if item_counts is None:
            item_counts = getattr(self.model, "train_item_counts", None)
            if item_counts is None:
                raise CompressionError(
                    "Expected `item_counts` for a model that was loaded from a folder, or "
                    "built before `import cprec_recbole`, but got none; pass the training dataset "
                    "or an array [n_items]."
                )
        return _checked_counts(item_counts, self.n_items)

    def copy_host(self) -> Host:
        """A deep copy of the host without its item table, and what is known of its items; all of
        it can be trained, also what was frozen in the original."""
        holds = self.record.table.holds
        known = (*holds, "train_item_counts", "item_tokens", "vocabulary")
        left_out = [getattr(self.host, name, None) for name in known]
        host = copy.deepcopy(self.host, memo={id(each): None for each in left_out})
        host.item_embedding = self.record.table.look_up(self.host, None)
        host.requires_grad_(True)
        return host


def _checked_counts(item_counts: Any, n_items: int) -> np.ndarray:
    dataset = getattr(item_counts, "_dataset", item_counts)  # of a data loader
    if hasattr(dataset, "inter_feat"):
        item_counts = count_items(dataset)
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
            "Expected `item_counts` to be how often each item occurs, but got no number above 1 "
            f"and shares such as {counts.max():g}; multiply them by the number of interactions."
        )
    return counts
