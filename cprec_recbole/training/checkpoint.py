"""A model that RecBole trained, out of its checkpoint, with the data that it was trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.utils import init_seed
from recbole.utils.argument_list import dataset_arguments, evaluation_arguments
from torch import nn

from cprec_recbole.config import CompressionConfig, CompressionError, reject_unknown
from cprec_recbole.host import library
from cprec_recbole.host.checkpoint import Checkpoint, read_checkpoint, shown
from cprec_recbole.host.numbering import check_checkpoint_numbering
from cprec_recbole.models import MODELS
from cprec_recbole.models.spec import ModelSpec

# beside those of the model, the data set and the evaluation: what batches and random draws need
_ALSO = ("seed", "reproducibility", "train_batch_size", "encoding", "shuffle", "transform")


class TrainedModel(NamedTuple):
    """A trained model and RecBole's data for it."""

    model: nn.Module
    train: Any
    valid: Any
    test: Any


def load_trained(
    file: str | os.PathLike[str], options: dict[str, Any] | None = None
) -> TrainedModel:
    """Read a RecBole checkpoint, without running anything that is in it, and build its model.

    RecBole options, such as `data_path`, win over the checkpoint's. A CompressionError for no
    checkpoint of RecBole's, one that asks for code to be run, a data set that is not found or is
    not the one that the model was trained on.
    """
    checkpoint = read_checkpoint(file)
    known = {model.spec.name: (model.spec.model_class, model.spec) for model in MODELS}
    known |= {model.__name__: (model, model.spec) for model in MODELS}
    if checkpoint.model not in known:
        raise CompressionError(
            f"Expected `checkpoint` to be of one of {', '.join(known)}, but {os.fspath(file)} is "
            f"of {shown(checkpoint.model)}."
        )
    model_class, spec = known[checkpoint.model]
    options = options or {}
    config = library.recbole_config(
        model_class, checkpoint.dataset, _options(checkpoint, spec) | options
    )
    reject_unknown(options, library.known_options(config))
    if not os.path.isdir(config["data_path"]):  # RecBole would look for it on the internet
        raise CompressionError(
            f"Expected `data_path` to have the folder {checkpoint.dataset} that {os.fspath(file)} "
            f"was trained on, but {config['data_path']} does not exist."
        )
    init_seed(config["seed"], config["reproducibility"])
    dataset = library.recbole_dataset(config)
    check_checkpoint_numbering(os.fspath(file), checkpoint.options, dataset)
    train, valid, test = library.recbole_loaders(config, dataset)
    model = library.recbole_model(config, train._dataset)
    try:
        model.load_state_dict(checkpoint.state)
    except (RuntimeError, CompressionError) as error:
        raise CompressionError(
            f"Expected the data set {checkpoint.dataset} to be the one that {os.fspath(file)} was "
            f"trained on, but the weights do not fit: {library.in_a_line(error)[:300]}"
        ) from error
    return TrainedModel(model.to(config["device"]).eval(), train, valid, test)


def _options(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """What the model and its data set are made by, and nothing else that the file names."""
    names = {name if isinstance(name, str) else name[0] for name in spec.architecture}
    names |= {*_ALSO, *CompressionConfig.option_names(), *library.model_options(spec.name)}
    names |= {*dataset_arguments, *evaluation_arguments}
    options = {name: value for name, value in checkpoint.options.items() if name in names}
    options |= _negatives(checkpoint.options.get("train_neg_sample_args"))
    folder = checkpoint.options.get("data_path")
    if isinstance(folder, str) and folder and checkpoint.dataset != "ml-100k":
        options["data_path"] = str(Path(folder).parent)  # RecBole has added the data set's name
    return options | {"use_gpu": torch.cuda.is_available()}


def _negatives(given: Any) -> dict[str, Any]:
    """RecBole's option of that name where there are any; up to 1.1.0 it had a `strategy`."""
    if not isinstance(given, dict) or given.get("strategy", given.get("distribution")) == "none":
        return {}
    if "strategy" in given:
        distribution = given.get("distribution", "uniform")
        given = {"distribution": distribution, "sample_num": given.get("by", 1)}
    return {"train_neg_sample_args": given}
