"""The ten compressed models: each made from its spec."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cprec_recbole.host.provider import importing_models
from cprec_recbole.models.item_tables import MaskedTable, RecBoleModel, with_one
from cprec_recbole.models.last_states import nextitnet_last, transformer_last
from cprec_recbole.models.recommender import HIDDEN_AT, CompressedRecommender, compressed_class
from cprec_recbole.models.spec import ModelSpec, pick
from cprec_recbole.sharing import Layer

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

with importing_models():
    from recbole.model import sequential_recommender as recbole_models


def _compressed(model_class: type[Any], *options: Any, **spec: Any) -> type[CompressedRecommender]:
    """The compressed form of a model that is built by `embedding_size` and other options."""
    architecture = ("embedding_size", *options, "loss_type")
    spec = {"size_option": "embedding_size", "architecture": architecture, **spec}
    return compressed_class(ModelSpec(model_class, **spec))


def _transformer(model_class: type[Any], *options: str, **spec: Any) -> type[CompressedRecommender]:
    """The same around RecBole's TransformerEncoder, with options besides that one's."""
    shape = ("n_layers", "n_heads", "hidden_size", "inner_size", "hidden_act", "layer_norm_eps")
    others = ("hidden_dropout_prob", "attn_dropout_prob", "initializer_range", "loss_type")
    spec.setdefault("layers", lambda model: _transformer_layers(model.trm_encoder))
    return _compressed(
        model_class,
        size_option="hidden_size",
        table_std=lambda model, n_items: model.initializer_range,
        architecture=(*shape, *others, *options),
        **spec,
    )


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


CpNextItNet = _compressed(  # WSDM 2019
    recbole_models.NextItNet,
    *("dilations", "kernel_size", "reg_weight"),
    table_std=lambda model, n_items: math.sqrt(1 / (3 * n_items)),  # uniform in +-sqrt(1/n)
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


CpSASRec = _transformer(  # ICDM 2018
    recbole_models.SASRec, hidden_states=_sasrec_hidden, last_state=_sasrec_last
)


def _gru4rec_states(model: RecBoleModel, item_seq: Tensor) -> Tensor:
    return model.gru_layers(model.emb_dropout(model.item_embedding(item_seq)))[0]


def _gru4rec_last(model: RecBoleModel, item_seq: Tensor, lengths: Tensor) -> Tensor:
    return model.dense(pick(_gru4rec_states(model, item_seq), lengths))


CpGRU4Rec = _compressed(  # DLRS 2016
    recbole_models.GRU4Rec,
    *("hidden_size", "num_layers", "dropout_prob"),
    table_std=_xavier_std,
    layers=lambda model: _gru_layers(model.gru_layers),
    hidden_states=lambda model, item_seq: model.dense(_gru4rec_states(model, item_seq)),
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


CpBERT4Rec = _transformer(  # CIKM 2019
    recbole_models.BERT4Rec,
    "mask_ratio",
    last_state=_bert4rec_last,
    table=MaskedTable(),
    training_states=_bert4rec_training,
)
CpLightSANs = _transformer(recbole_models.LightSANs, "k_interests")  # SIGIR 2021
CpGCSAN = _transformer(  # IJCAI 2019
    recbole_models.GCSAN,
    *("step", "weight", "reg_weight"),
    layers=lambda model: _transformer_layers(model.self_attention),
    # the norm of the whole table, over the number of items
    penalty=lambda model: model.reg_weight * model.item_embedding.norm() / model.n_items,
)
CpNARM = _compressed(  # CIKM 2017
    recbole_models.NARM,
    *("hidden_size", "n_layers", "dropout_probs"),
    table_std=_xavier_std,
    layers=lambda model: _gru_layers(model.gru),
)
# KDD 2018
CpSTAMP = _compressed(recbole_models.STAMP, table_std=lambda model, n_items: 0.002)
CpSRGNN = _compressed(  # AAAI 2019
    recbole_models.SRGNN,
    "step",
    table_std=lambda model, n_items: math.sqrt(1 / (3 * model.embedding_size)),  # uniform
)


def _sine_penalty(model: RecBoleModel) -> Tensor | float:
    """With `loss_type: NLL`, the paper's: how alike the concepts are (SINE, equation 12)."""
    return model.reg_loss_ratio * model.calculate_reg_loss() if model.loss_type == "NLL" else 0.0


CpSINE = _compressed(  # WSDM 2021
    recbole_models.SINE,
    *("layer_norm_eps", "reg_loss_ratio"),
    *(("prototype_size", "L"), ("interest_size", "k"), ("tau_ratio", "tau")),
    table_std=_xavier_std,
    penalty=_sine_penalty,
    losses=("CE", "BPR", "NLL"),
)

TEN: list[type[CompressedRecommender]] = CompressedRecommender.__subclasses__()  # those above
