"""compress(): the one verb. Everything is checked first; then a new model is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cprec_recbole.compression.budget import OptionSearch, checked_bytes, checked_ratio
from cprec_recbole.compression.histories import drawn_histories, histories_of
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.quantize import check_precision, quantize
from cprec_recbole.compression.warm_start import FIT_HISTORIES
from cprec_recbole.config import CompressionConfig, CompressionError, is_number, reject_unknown
from cprec_recbole.costs import PARAMETERS, Unit
from cprec_recbole.host.numbering import check_numbering
from cprec_recbole.models.eval_mode import can_be_trained
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import check_validation_data, evaluate, valid_metric

_N_RATIOS = 24  # between which max_loss is searched: five evaluations find one of them
_LEAST_RATIO = 1.25


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
    clusters of a tree to the probabilities of its blocks (see `warm_start`); what that came to is
    in the result's `warm_start`. With nothing to lose (`ranks=[d]`, `sharing="none"`,
    `softmax="full"`) the scores equal the original's.

    Either name the options, or give one budget and let cutoffs, ranks and sharing be chosen. The
    budget is always met; the choice is printed with its reasons, and is the result's `choice`.

    Args:
        model: RecBole's NextItNet, SASRec, GRU4Rec, BERT4Rec, LightSANs, GCSAN, NARM, STAMP, SRGNN
            or SINE, one of your own (see `register`), or a Cp model with the options of
            `CompressionConfig.uncompressed()`.
        config: the options as one object; or name them one by one instead, e.g.
            `compress(model, ranks=[64, 16, 4], sharing="cross_block")`. See CompressionConfig for
            `ranks`, `cutoffs`, `sharing`, `softmax` and `tied`. The result reads a history as the
            model does, whatever the object's `training`; how it is trained on is the loader's. With
            a budget, sharing is chosen unless it is named; an object names it.
        item_counts: how often each item occurs in training: a RecBole dataset (the training
            split), or an array `[n_items]`. May be left out for a model that was built after
            `import cprec_recbole`, which remembers them.
        data: training data to fit table and layers on: RecBole's dataset or data loader, or lists
            of item ids. Left out: what `item_counts` holds, or histories drawn from the counts,
            which serve nearly as well.
        ratio: a budget: at least so many times fewer parameters than the model's.
        size: a budget: at most so many bytes of weights, e.g. `"2MB"`.
        max_loss: a budget: the smallest model that loses at most this share of the model's
            validation metric before any fine-tuning, e.g. 0.01.
        valid_data: RecBole's validation data; with `max_loss`.
        dtype: `"int8"` keeps all matrices in int8, as `quantize` does; a budget then counts bytes
            of the weights, of which `ratio` allows so many times fewer than the model's. Of
            training only `recover` is possible.
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
    _check_one_budget(base, ratio=ratio, size=size, max_loss=max_loss)
    ratio = None if ratio is None else checked_ratio(ratio)
    size = None if size is None else checked_bytes(size)
    _check_max_loss(max_loss, valid_data)
    original = Original.of(model).in_float()
    if dtype not in (None, "int8"):
        raise CompressionError(
            f'Expected `dtype` to be "int8", or left out for float rows, but got {dtype!r}.'
        )
    if dtype is not None:
        check_precision("model", original.dtype)
    original.spec.check_loss(base, str(original.inner.loss_type))
    base.plan(original.dim, original.n_items)
    given = {"data": data, "item_counts": item_counts, "valid_data": valid_data}
    for name, each in given.items():
        check_numbering(original.model, each, name)
    counts = original.counts(_dataset_of(data) if item_counts is None else item_counts)
    histories = _histories(data, item_counts, original, counts)
    unit = PARAMETERS if dtype is None else Unit.int8_bytes(original.dtype)
    with torch.random.fork_rng(devices=[]):  # fresh factors are drawn, and written over
        search = OptionSearch(original, counts, histories, base, sharing, unit)
        if max_loss is not None:
            small = _within_loss(search, float(max_loss), valid_data, dtype)
        elif ratio is not None:
            small = search.within(int(search.whole / ratio))
        elif size is not None:
            small = search.within(search.limit_of_size(size))
        else:
            small = search.compressed(base)
    if verbose and small.choice is not None:
        print(small.choice)
    small.to(original.dtype).train(model.training)
    return small if dtype is None else quantize(small)


def _within_loss(
    search: OptionSearch, max_loss: float, valid_data: Any, dtype: str | None
) -> CompressedRecommender:
    """The smallest compressed model that loses at most a share of the validation metric, by
    bisection over ratios: a smaller model is taken to be no better."""
    metric = valid_metric(valid_data)
    whole = evaluate(search.original.model, valid_data)[metric]
    if not whole > 0:
        raise CompressionError(
            f"Expected a `model` whose {metric} on `valid_data` is above 0, to measure `max_loss` "
            f"by, but got {whole:.4f}."
        )
    largest = search.whole / search.smallest
    ratios = np.geomspace(min(_LEAST_RATIO, largest), largest, _N_RATIOS)
    best: CompressedRecommender | None = None
    tried: list[str] = []
    low, high = -1, len(ratios)  # ratios[low] is good enough, ratios[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        small = search.within(max(search.smallest, int(search.whole / ratios[middle])))
        score = evaluate(small if dtype is None else quantize(small), valid_data)[metric]
        tried.append(f"ratio {ratios[middle]:.2f}: {metric} {score:.4f}, {score / whole:.1%}")
        if score >= (1 - max_loss) * whole:
            low, best = middle, small
        else:
            high = middle
    if best is None or best.choice is None:
        raise CompressionError(
            f"Expected `max_loss` to be reachable without training, but got {max_loss}: "
            f"{'; '.join(tried)} of {whole:.4f}. Use ratio=... and recover()."
        )
    reason = f"measured, of {whole:.4f} on the validation data: {'; '.join(tried)}"
    best.choice = replace(best.choice, reasons=(*best.choice.reasons, reason))
    return best


def _dataset_of(data: Any) -> Any:
    """The RecBole dataset that data is or loads from; None for histories."""
    dataset = getattr(data, "_dataset", data)
    return dataset if hasattr(dataset, "inter_feat") else None


def _histories(data: Any, item_counts: Any, original: Original, counts: np.ndarray) -> Tensor:
    """What table and layers are fitted on, `[N, L]`."""
    length, name = original.inner.max_seq_length, "data"
    if data is None:
        data, name = _dataset_of(item_counts), "item_counts"
    if data is None:
        generator = torch.Generator().manual_seed(0)
        return drawn_histories(counts, FIT_HISTORIES, length, generator)
    return histories_of(data, original.n_items, length, name).items


def _check_one_budget(base: CompressionConfig, **budgets: Any) -> None:
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


def _check_max_loss(max_loss: object, valid_data: Any) -> None:
    if max_loss is None:
        if valid_data is not None:
            raise CompressionError(
                "Expected `valid_data` only with `max_loss`, but got it without; nothing else is "
                "measured on it."
            )
        return
    if not is_number(max_loss) or not 0 <= max_loss < 1:
        raise CompressionError(
            f"Expected `max_loss` to be a share from 0 to below 1, but got {max_loss!r}."
        )
    check_validation_data(valid_data)


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
