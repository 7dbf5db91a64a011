"""A model by RecBole's options: what they ask for, with fresh weights."""

from __future__ import annotations

from typing import Any

from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models.spec import ModelSpec, Parts
from cprec_recbole.partition import Partition


def compression_of(config: Any) -> CompressionConfig:
    """The compression options of a RecBole config; what it does not name keeps its default."""
    names = CompressionConfig.option_names()
    return CompressionConfig(**{name: config[name] for name in names if name in config})


def parts_of_config(spec: ModelSpec, config: Any, dataset: Any) -> Parts:
    """The parts of a model, by a RecBole config and its training data set."""
    from cprec_recbole.data.sequences import item_counts

    compression = compression_of(config)
    if config["shard_tails"]:
        raise CompressionError(
            "Expected no `shard_tails`, which this version no longer has: every process holds the "
            "whole compressed model (see docs/scale.md); leave the option out."
        )
    counts = item_counts(dataset)
    n_items = len(counts)
    if compression.negatives >= n_items:
        raise CompressionError(
            f"Expected `negatives` to be at most the {n_items - 1} items of the catalogue, but got "
            f"{compression.negatives}; 0 is the softmax over all of them."
        )
    if compression.negatives and config["loss_type"] == "BPR":
        raise CompressionError(
            "Expected `negatives` to be 0 with `loss_type: BPR`, which has one negative for each "
            f"target, but got {compression.negatives}; use `loss_type: CE`."
        )
    if config["loss_type"] == "BPR":
        _check_negatives(compression, config["train_neg_sample_args"], n_items)
    plan = compression.plan(spec.dim(config[spec.size_option]), n_items)
    inner = spec.build_inner(config, dataset)
    inner.n_items = n_items
    partition = Partition.from_counts(counts, plan.cutoffs)
    tables = []
    for _ in range(1 if compression.tied else 2):
        tables.append(BlockEmbedding(partition, plan.ranks, plan.dim))
        tables[-1].reset_parameters(spec.table_std(inner, n_items))
    if _steps_sparsely(spec, compression, config):
        for table in tables if compression.negatives else tables[:1]:
            table.look_up_sparsely()
    last_column = spec.reads_last_column and compression.training == "last_position"
    return Parts(inner, tables[0], tables[-1], compression, last_column, counts)


def _check_negatives(compression: CompressionConfig, wanted: Any, n_items: int) -> None:
    """Negatives at every position are drawn by the model, and only as RecBole does by default."""
    if n_items < 3:
        raise CompressionError(
            "Expected `loss_type` to be CE for a catalogue of one item, which has no negative, "
            "but got BPR."
        )
    plain = (wanted["distribution"], wanted["sample_num"], bool(wanted["dynamic"]))
    drawn_here = compression.training == "all_positions"
    if drawn_here and plain != ("uniform", 1, False):
        raise CompressionError(
            "Expected `train_neg_sample_args` to be one uniform negative with `training: "
            f"all_positions`, but got {wanted}; use `training: last_position`."
        )
    if not drawn_here and plain[0] in (None, "none"):
        raise CompressionError(
            f"Expected `train_neg_sample_args` to draw negatives for BPR, but got {wanted}."
        )


def _steps_sparsely(spec: ModelSpec, compression: CompressionConfig, config: Any) -> bool:
    """Whether the item table gets sparse gradients under RecBole's options: nothing but look-ups
    may read it, as with sampled negatives: neither a softmax over all items nor a penalty or decay
    of all weights."""
    # with `sgd` or `adagrad` the result is that of dense gradients; `sparse_adam` asks for a row's
    # averages to move only when the row is looked up
    learner = str(config["learner"]).lower()
    looked_up = not compression.tied or compression.negatives or config["loss_type"] == "BPR"
    if not looked_up or spec.penalty is not None or config["weight_decay"]:
        return False
    on_several_gpus = config["single_spec"] is False and config["device"].type == "cuda"
    if on_several_gpus and learner == "sparse_adam":
        raise CompressionError(
            "Expected another `learner` than sparse_adam on several GPUs, which do not add up "
            "sparse gradients; use adam, or one process."
        )
    return learner in ("sgd", "adagrad", "sparse_adam") and not on_several_gpus
