"""compress(): the one verb. Everything is checked first; then a new model is made."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from cprec_recbole.compression.budget import (
    OptionSearch,
    check_number,
    checked_bytes,
    checked_ratio,
)
from cprec_recbole.compression.histories import dataset_of, drawn_histories, histories_of
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.quantize import check_precision, quantize
from cprec_recbole.compression.warm_start import FIT_HISTORIES
from cprec_recbole.config import (
    ROUNDINGS,
    CompressionConfig,
    CompressionError,
    check_choice,
    reject_unknown,
)
from cprec_recbole.costs import PARAMETERS, Unit
from cprec_recbole.host.numbering import check_numbering
from cprec_recbole.models.eval_mode import can_be_trained
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import check_validation_data


@can_be_trained
def compress(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    item_counts: Any = None,
    data: Any = None,
    ratio: float | None = None,
    size: int | str | None = None,
    max_loss: float | None = None,
    valid_data: Any = None,
    dtype: str | None = None,
    verbose: bool = True,
    **options: Any,
) -> CompressedRecommender:
    """Make a compressed copy of one of RecBole's sequential models, fresh or trained.

    The model itself is left as it was. Weights are carried over: the factors are the truncated
    SVD of each block of the table, rows weighted by item counts, directions by what the hidden
    states of a trained model score. Its layers are then fitted to its hidden states, and the
    clusters of a tree to the probabilities of its blocks; what that came to is the result's
    `warm_start`. With nothing to lose (`ranks=[d]`, `sharing="none"`, `softmax="full"`) the scores
    equal the original's.

    Either name the options, or give one budget and let cutoffs, ranks and sharing be chosen. The
    budget is always met; the choice is printed with its reasons, and is the result's `choice`.

    Args:
        model: RecBole's NextItNet, SASRec, GRU4Rec, BERT4Rec, LightSANs, GCSAN, NARM, STAMP, SRGNN
            or SINE, one of your own (see `register`), or a Cp model with the options of
            `CompressionConfig.uncompressed()`.
        config: the options as one object, or by name, as in `compress(model, ranks=[64, 16, 4])`:
            see CompressionConfig. With a budget, sharing is chosen unless it is named; an object
            names it. The result reads a history as the model does, whatever the `training`.
        item_counts: how often each item occurs in training: a RecBole dataset (the training
            split), or an array `[n_items]`. A model built after `import cprec_recbole` knows them.
        data: training data to fit table and layers on: RecBole's dataset or data loader, or lists
            of item ids. Left out: what `item_counts` holds, or histories drawn from the counts,
            which serve nearly as well.
        ratio: a budget: at least so many times fewer parameters than the model's.
        size: a budget: at most so many bytes of weights, e.g. `"2MB"`.
        max_loss: a budget: the smallest model that loses at most this share of the model's
            validation metric before any fine-tuning, e.g. 0.01.
        valid_data: RecBole's validation data; with `max_loss`.
        dtype: `"int8"`, `"mixed"` or `"int4"`: the result is quantized, as `quantize` does; a
            budget then counts bytes of the weights. Of training only `recover` is possible.
        verbose: whether to print what was chosen for a budget.

    Returns:
        The Cp model of the same name, on the model's device, in its precision and in its train or
        eval mode. A model in half precision is compressed in float32, for which it is copied.

    Raises:
        CompressionError: a model that is not supported or is compressed already, an option that
            is unknown or breaks a rule, counts or data that are missing or do not fit, a budget
            below the smallest possible model.
    """
    base = _options(config, options)
    sharing = options.get("sharing") if config is None else config.sharing
    _check_budget(base, {"ratio": ratio, "size": size, "max_loss": max_loss}, valid_data)
    n_bytes = None if size is None else checked_bytes(size)
    original = Original.of(model).in_float()
    unit = PARAMETERS
    if dtype is not None:
        check_choice("dtype", dtype, ROUNDINGS)
        check_precision("model", original.dtype)
        unit = Unit.bytes_in(dtype, original.dtype.itemsize)
    original.spec.check_loss(base, str(original.inner.loss_type))
    base.plan(original.dim, original.n_items)
    for given, name in ((data, "data"), (item_counts, "item_counts"), (valid_data, "valid_data")):
        check_numbering(original.model, given, name)
    counts = original.counts(dataset_of(data) if item_counts is None else item_counts)
    data, name = (dataset_of(item_counts), "item_counts") if data is None else (data, "data")
    length = original.inner.max_seq_length
    if data is None:
        histories = drawn_histories(counts, FIT_HISTORIES, length, torch.Generator().manual_seed(0))
    else:
        histories = histories_of(data, original.n_items, length, name).items
    with torch.random.fork_rng(devices=[]):  # fresh factors are drawn, and written over
        search = OptionSearch(original, counts, histories, base, sharing, unit)
        if max_loss is not None:
            small = search.within_loss(float(max_loss), valid_data)
        elif ratio is not None:
            small = search.within(int(search.whole / float(ratio)))
        elif n_bytes is not None:
            small = search.within(n_bytes * unit.other // original.dtype.itemsize)
        else:
            small = search.compressed(base)
    if verbose and small.choice is not None:
        print(small.choice)
    small.to(original.dtype).train(model.training)
    return small if dtype is None else quantize(small, dtype)


def _check_budget(base: CompressionConfig, budgets: dict[str, Any], valid_data: Any) -> None:
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise CompressionError(
            f"Expected one budget, but got {' and '.join(f'`{name}`' for name in given)}; the "
            "others follow from it."
        )
    fixed = [name for name in ("ranks", "cutoffs") if getattr(base, name) is not None]
    if given and fixed:
        raise CompressionError(
            f"Expected either a budget or `{fixed[0]}`, but got `{given[0]}` too; a budget chooses "
            "ranks and cutoffs."
        )
    if "ratio" in given:
        checked_ratio(budgets["ratio"])
    if "max_loss" in given:
        share = "a share from 0 to below 1"
        check_number("max_loss", budgets["max_loss"], share, 0, math.nextafter(1, 0))
        check_validation_data(valid_data)
    elif valid_data is not None:
        raise CompressionError(
            "Expected `valid_data` only with `max_loss`, but got it without; nothing else is "
            "measured on it."
        )


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
