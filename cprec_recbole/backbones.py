"""A record for each RecBole model that can be compressed: its table, its layers, its hidden states.

Another model needs one record here and three lines in `models.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cprec_recbole.config import CompressionError
from cprec_recbole.registration import importing_models
from cprec_recbole.sharing import Layer

with importing_models():
    from recbole.model.abstract_recommender import SequentialRecommender
    from recbole.model.sequential_recommender.gru4rec import GRU4Rec
    from recbole.model.sequential_recommender.nextitnet import NextItNet
    from recbole.model.sequential_recommender.sasrec import SASRec

# RecBole's models are not typed. A host is one; its `item_embedding` turns ids into vectors.
Host = Any


@dataclass(frozen=True)
class Backbone:
    """What compression has to know of one RecBole model.

    Attributes:
        host: RecBole's model class.
        size_option: RecBole's name for the embedding size.
        layers: the stack's layers as parameter slots, normalisation layers left out.
        group: layers `g` of one residual block.
        hidden_states: `(model, item_seq [B, L]) -> [B, L, d]`; position t sees items up to t only.
        table_std: `(model, n_items) -> float`, the spread that the host gives a fresh table.
        architecture: attributes of the host that are named as the RecBole options they came from;
            with them an equal host can be built.
        penalty: `(model) -> []`, what the host adds to its loss; None for nothing.
        reads_last_column: the host predicts from the last column of a padded batch, even where a
            short history has padding there.
    """

    host: type[SequentialRecommender]
    size_option: str
    layers: Callable[[Host], list[Layer]]
    group: int
    hidden_states: Callable[[Host, Tensor], Tensor]
    table_std: Callable[[Host, int], float]
    architecture: tuple[str, ...]
    penalty: Callable[[Host], Tensor] | None = None
    reads_last_column: bool = False


def find_backbone(model: nn.Module) -> Backbone:
    """The record of a RecBole model.

    Raises:
        CompressionError: not one of the supported models. A subclass may compute something else
            than its parent, so it is refused too.
    """
    for backbone in BACKBONES:
        if type(model) is backbone.host:
            return backbone
    names = ", ".join(backbone.host.__name__ for backbone in BACKBONES)
    raise CompressionError(
        f"Expected `model` to be one of RecBole's {names}, but got {type(model).__name__}."
    )


def build_host(record: Backbone, config: Any, dataset: Any) -> Host:
    """RecBole's model without its table: built for a catalogue of one item.

    Args:
        record: the model's record.
        config: a RecBole config.
        dataset: a RecBole dataset, or anything with `iid_field` and `num(field)`.
    """
    return record.host(config, _OneItemCatalogue(dataset))


def architecture(record: Backbone, host: Host) -> dict[str, Any]:
    """The RecBole options by which an equal host can be built, without its table.

    Args:
        record: the model's record.
        host: RecBole's model.
    """
    options = {name: getattr(host, name) for name in record.architecture}
    return options | {
        "MAX_ITEM_LIST_LENGTH": host.max_seq_length,
        "USER_ID_FIELD": host.USER_ID,
        "ITEM_ID_FIELD": host.ITEM_ID,
        "LIST_SUFFIX": host.ITEM_SEQ.removeprefix(host.ITEM_ID),
        "ITEM_LIST_LENGTH_FIELD": host.ITEM_SEQ_LEN,
        "NEG_PREFIX": host.NEG_ITEM_ID.removesuffix(host.ITEM_ID),
    }


class _OneItemCatalogue:
    """A dataset as a host sees it that must not allocate its `[n_items, d]` table."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def num(self, field: str) -> int:
        return 1 if field == self._dataset.iid_field else self._dataset.num(field)


def _nextitnet_layers(model: Host) -> list[Layer]:
    convolutions = [c for block in model.residual_blocks for c in (block.conv1, block.conv2)]
    return [[(c, "weight"), (c, "bias")] for c in convolutions]


def _nextitnet_hidden(model: Host, item_seq: Tensor) -> Tensor:
    return model.final_layer(model.residual_blocks(model.item_embedding(item_seq)))


def _nextitnet_penalty(model: Host) -> Tensor:
    """The L2 term on the whole table, the final layer and the kernels; a shared kernel once."""
    kernels = [p for n, p in model.residual_blocks.named_parameters() if n.endswith("weight")]
    norms = [torch.linalg.vector_norm(p) for p in (model.final_layer.weight, *kernels)]
    return model.reg_weight * (model.item_embedding.norm() + torch.stack(norms).sum())


def _sasrec_layers(model: Host) -> list[Layer]:
    return [
        [
            (module, name)
            for module in layer.modules()
            if not isinstance(module, nn.LayerNorm)
            for name, _ in module.named_parameters(recurse=False)
        ]
        for layer in model.trm_encoder.layer
    ]


def _sasrec_hidden(model: Host, item_seq: Tensor) -> Tensor:
    positions = torch.arange(item_seq.shape[1], device=item_seq.device)
    inputs = model.item_embedding(item_seq) + model.position_embedding(positions)
    inputs = model.dropout(model.LayerNorm(inputs))
    mask = model.get_attention_mask(item_seq)
    return model.trm_encoder(inputs, mask, output_all_encoded_layers=False)[-1]


def _gru4rec_layers(model: Host) -> list[Layer]:
    gru = model.gru_layers
    names = ("weight_ih_l{}", "weight_hh_l{}")
    return [[(gru, name.format(i)) for name in names] for i in range(gru.num_layers)]


def _gru4rec_hidden(model: Host, item_seq: Tensor) -> Tensor:
    vectors = model.emb_dropout(model.item_embedding(item_seq))
    return model.dense(model.gru_layers(vectors)[0])


NEXTITNET = Backbone(
    host=NextItNet,
    size_option="embedding_size",
    layers=_nextitnet_layers,
    group=2,  # two dilated convolutions to a residual block
    hidden_states=_nextitnet_hidden,
    table_std=lambda model, n_items: math.sqrt(1 / (3 * n_items)),  # uniform in +-sqrt(1/n)
    architecture=("embedding_size", "dilations", "kernel_size", "reg_weight", "loss_type"),
    penalty=_nextitnet_penalty,
    reads_last_column=True,
)
SASREC = Backbone(
    host=SASRec,
    size_option="hidden_size",
    layers=_sasrec_layers,
    group=1,
    hidden_states=_sasrec_hidden,
    table_std=lambda model, n_items: model.initializer_range,
    architecture=(
        *("n_layers", "n_heads", "hidden_size", "inner_size", "hidden_act", "layer_norm_eps"),
        *("hidden_dropout_prob", "attn_dropout_prob", "initializer_range", "loss_type"),
    ),
)
GRU4REC = Backbone(
    host=GRU4Rec,
    size_option="embedding_size",
    layers=_gru4rec_layers,
    group=1,
    hidden_states=_gru4rec_hidden,
    table_std=lambda model, n_items: math.sqrt(2 / (n_items + model.embedding_size)),  # Xavier
    architecture=("embedding_size", "hidden_size", "num_layers", "dropout_prob", "loss_type"),
)
BACKBONES = (NEXTITNET, SASREC, GRU4REC)
