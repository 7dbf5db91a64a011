"""The ten compressed models: each a class with its spec."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cprec_recbole.host.provider import importing_models
from cprec_recbole.models.item_tables import MaskedTable, RecBoleModel, with_one
from cprec_recbole.models.last_states import nextitnet_last, transformer_last
from cprec_recbole.models.recommender import HIDDEN_AT, CompressedRecommender
from cprec_recbole.models.spec import ModelSpec, pick
from cprec_recbole.sharing import Layer

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

with importing_models():
    from recbole.model import sequential_recommender as recbole_models


def _xavier_std(model: RecBoleModel, n_items: int) -> float:
    """The spread of `xavier_normal_` for a table `[n_items, embedding_size]`."""
    return math.sqrt(2 / (n_items + model.embedding_size))


def _transformer_layers(encoder: RecBoleModel) -> list[Layer]:
    return [
        [
            (module, name)
            for module in layer.modules()
            if not isinstance(module, nn.LayerNorm)
            for name, _ in module.named_parameters(recurse=False)
        ]
        for layer in encoder.layer
    ]


def _gru_layers(gru: nn.GRU) -> list[Layer]:
    """The layers of a GRU, which has no biases."""
    names = ("weight_ih_l{}", "weight_hh_l{}")
    return [[(gru, name.format(i)) for name in names] for i in range(gru.num_layers)]


_TRANSFORMER_OPTIONS = (
    "n_layers",
    "n_heads",
    "hidden_size",
    "inner_size",
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attn_dropout_prob",
    "initializer_range",
    "loss_type",
)
_transformer = partial(
    ModelSpec,
    size_option="hidden_size",
    table_std=lambda model, n_items: model.initializer_range,
    layers=lambda model: _transformer_layers(model.trm_encoder),
)


def _nextitnet_layers(model: RecBoleModel) -> list[Layer]:
    convolutions = [c for block in model.residual_blocks for c in (block.conv1, block.conv2)]
    return [[(c, "weight"), (c, "bias")] for c in convolutions]


def _nextitnet_hidden(model: RecBoleModel, item_seq: Tensor) -> Tensor:
    return model.final_layer(model.residual_blocks(model.item_embedding(item_seq)))


def _nextitnet_penalty(model: RecBoleModel) -> Tensor:
    """The L2 term on the whole table, the final layer and the kernels; a shared kernel once."""
    kernels = [p for n, p in model.residual_blocks.named_parameters() if n.endswith("weight")]
    norms = [torch.linalg.vector_norm(p) for p in (model.final_layer.weight, *kernels)]
    return model.reg_weight * (model.item_embedding.norm() + torch.stack(norms).sum())


class CpNextItNet(CompressedRecommender):
    """NextItNet (WSDM 2019), compressed."""

    spec = ModelSpec(
        model_class=recbole_models.NextItNet,
        size_option="embedding_size",
        table_std=lambda model, n_items: math.sqrt(1 / (3 * n_items)),  # uniform in +-sqrt(1/n)
        architecture=("embedding_size", "dilations", "kernel_size", "reg_weight", "loss_type"),
        layers=_nextitnet_layers,
        layers_per_block=2,  # two dilated convolutions to a residual block
        hidden_states=_nextitnet_hidden,
        last_state=nextitnet_last,
        penalty=_nextitnet_penalty,
        reads_last_column=True,
    )


def _sasrec_inputs(model: RecBoleModel, item_seq: Tensor) -> Tensor:
    positions = model.position_embedding.weight[: item_seq.shape[1]]
    return model.dropout(model.LayerNorm(model.item_embedding(item_seq) + positions))


def _sasrec_hidden(model: RecBoleModel, item_seq: Tensor) -> Tensor:
    inputs, mask = _sasrec_inputs(model, item_seq), model.get_attention_mask(item_seq)
    return model.trm_encoder(inputs, mask, output_all_encoded_layers=False)[-1]


def _sasrec_last(model: RecBoleModel, item_seq: Tensor, lengths: Tensor) -> Tensor:
    inputs = _sasrec_inputs(model, item_seq)
    return transformer_last(model.trm_encoder, inputs, item_seq, lengths, is_causal=True)


class CpSASRec(CompressedRecommender):
    """SASRec (ICDM 2018), compressed."""

    spec = _transformer(
        model_class=recbole_models.SASRec,
        architecture=_TRANSFORMER_OPTIONS,
        hidden_states=_sasrec_hidden,
        last_state=_sasrec_last,
    )


def _gru4rec_states(model: RecBoleModel, item_seq: Tensor) -> Tensor:
    return model.gru_layers(model.emb_dropout(model.item_embedding(item_seq)))[0]


def _gru4rec_hidden(model: RecBoleModel, item_seq: Tensor) -> Tensor:
    return model.dense(_gru4rec_states(model, item_seq))


def _gru4rec_last(model: RecBoleModel, item_seq: Tensor, lengths: Tensor) -> Tensor:
    return model.dense(pick(_gru4rec_states(model, item_seq), lengths))


class CpGRU4Rec(CompressedRecommender):
    """GRU4Rec (DLRS 2016), compressed."""

    spec = ModelSpec(
        model_class=recbole_models.GRU4Rec,
        size_option="embedding_size",
        table_std=_xavier_std,
        architecture=("embedding_size", "hidden_size", "num_layers", "dropout_prob", "loss_type"),
        layers=lambda model: _gru_layers(model.gru_layers),
        hidden_states=_gru4rec_hidden,
        last_state=_gru4rec_last,
    )


def _bert4rec_last(model: RecBoleModel, item_seq: Tensor, lengths: Tensor) -> Tensor:
    """The state at a mask after the newest item; as in RecBole, the first column makes way."""
    longer = torch.nn.functional.pad(item_seq, (0, 1))
    masked = longer.scatter(1, lengths.unsqueeze(1), model.n_items)[:, 1:]
    inputs = _sasrec_inputs(model, masked)
    state = transformer_last(model.trm_encoder, inputs, masked, lengths, is_causal=False)
    return with_one(model.output_ln(model.output_gelu(model.output_ffn(state))))


def _bert4rec_training(model: RecBoleModel, batch: Interaction) -> tuple[Tensor, Tensor, Tensor]:
    """The states at the items that RecBole's `mask_itemseq` hid, and these items."""
    states, index = model.forward(batch["Mask_" + model.ITEM_SEQ]), batch[HIDDEN_AT]
    row, column = (index > 0).nonzero(as_tuple=True)  # 0 fills the rows up
    hidden = with_one(states[row, index[row, column]])
    targets = (batch[name + model.ITEM_ID][row, column] for name in ("Pos_", "Neg_"))
    return hidden, *targets


class CpBERT4Rec(CompressedRecommender):
    """BERT4Rec (CIKM 2019), compressed."""

    spec = _transformer(
        model_class=recbole_models.BERT4Rec,
        architecture=(*_TRANSFORMER_OPTIONS, "mask_ratio"),
        last_state=_bert4rec_last,
        table=MaskedTable(),
        training_states=_bert4rec_training,
    )


class CpLightSANs(CompressedRecommender):
    """LightSANs (SIGIR 2021), compressed."""

    spec = _transformer(
        model_class=recbole_models.LightSANs,
        architecture=(*_TRANSFORMER_OPTIONS, "k_interests"),
    )


class CpGCSAN(CompressedRecommender):
    """GC-SAN (IJCAI 2019), compressed."""

    spec = _transformer(
        model_class=recbole_models.GCSAN,
        architecture=(*_TRANSFORMER_OPTIONS, "step", "weight", "reg_weight"),
        layers=lambda model: _transformer_layers(model.self_attention),
        # the norm of the whole table, over the number of items
        penalty=lambda model: model.reg_weight * model.item_embedding.norm() / model.n_items,
    )


class CpNARM(CompressedRecommender):
    """NARM (CIKM 2017), compressed."""

    spec = ModelSpec(
        model_class=recbole_models.NARM,
        size_option="embedding_size",
        table_std=_xavier_std,
        architecture=("embedding_size", "hidden_size", "n_layers", "dropout_probs", "loss_type"),
        layers=lambda model: _gru_layers(model.gru),
    )


class CpSTAMP(CompressedRecommender):
    """STAMP (KDD 2018), compressed."""

    spec = ModelSpec(
        model_class=recbole_models.STAMP,
        size_option="embedding_size",
        table_std=lambda model, n_items: 0.002,
        architecture=("embedding_size", "loss_type"),
    )


class CpSRGNN(CompressedRecommender):
    """SR-GNN (AAAI 2019), compressed."""

    spec = ModelSpec(
        model_class=recbole_models.SRGNN,
        size_option="embedding_size",
        table_std=lambda model, n_items: math.sqrt(1 / (3 * model.embedding_size)),  # uniform
        architecture=("embedding_size", "step", "loss_type"),
    )


def _sine_penalty(model: RecBoleModel) -> Tensor | float:
    """With `loss_type: NLL`, the paper's: how alike the concepts are (SINE, equation 12)."""
    return model.reg_loss_ratio * model.calculate_reg_loss() if model.loss_type == "NLL" else 0.0


class CpSINE(CompressedRecommender):
    """SINE (WSDM 2021), compressed."""

    spec = ModelSpec(
        model_class=recbole_models.SINE,
        size_option="embedding_size",
        table_std=_xavier_std,
        architecture=(
            "embedding_size",
            "layer_norm_eps",
            "reg_loss_ratio",
            "loss_type",
            ("prototype_size", "L"),
            ("interest_size", "k"),
            ("tau_ratio", "tau"),
        ),
        penalty=_sine_penalty,
        losses=("CE", "BPR", "NLL"),
    )


TEN: list[type[CompressedRecommender]] = CompressedRecommender.__subclasses__()  # those above
