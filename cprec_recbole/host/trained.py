"""A model that RecBole trained, out of its checkpoint, with the data that it was trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.utils import get_model, init_seed
from torch import nn

from cprec_recbole.config import CompressionError, reject_unknown
from cprec_recbole.host.checkpoint import Checkpoint, read_checkpoint
from cprec_recbole.host.library import (
    known_options,
    recbole_config,
    recbole_dataset,
    recbole_loaders,
)

# what RecBole works out for itself, or what belongs to the machine that trained
_DERIVED = (
    *("model", "dataset", "data_path", "checkpoint_dir", "train_neg_sample_args", "use_gpu"),
    *("valid_neg_sample_args", "test_neg_sample_args", "single_spec", "local_rank", "gpu_id"),
)


class Trained(NamedTuple):
    """A trained model and RecBole's data for it."""

    model: nn.Module
    train: Any
    valid: Any
    test: Any


def load_trained(file: str | os.PathLike[str], options: dict[str, Any] | None = None) -> Trained:
    """Read a RecBole checkpoint, without running anything that is in it, and build its model.

    Args:
        file: RecBole's `.pth`.
        options: RecBole options that win over the checkpoint's, such as `data_path`.

    Raises:
        CompressionError: no checkpoint of RecBole's, one that asks for code to be run, a data set
            that is not found or is not the one that the model was trained on.
    """
    checkpoint = read_checkpoint(file)
    config = recbole_config(
        checkpoint.model, checkpoint.dataset, _options(checkpoint) | (options or {})
    )
    reject_unknown(options or {}, known_options(config))
    if not os.path.isdir(config["data_path"]):  # RecBole would look for it on the internet
        raise CompressionError(
            f"Expected `data_path` to have the folder {checkpoint.dataset} that {os.fspath(file)} "
            f"was trained on, but {config['data_path']} does not exist."
        )
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = recbole_loaders(config, recbole_dataset(config))
    model = get_model(checkpoint.model)(config, train._dataset)
    try:
        model.load_state_dict(checkpoint.state)
    except (RuntimeError, CompressionError) as error:
        reason = " ".join(str(error).split())
        raise CompressionError(
            f"Expected the data set {checkpoint.dataset} to be the one that {os.fspath(file)} was "
            f"trained on, but the weights do not fit: {reason[:300]}"
        ) from error
    return Trained(model.to(config["device"]).eval(), train, valid, test)


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    options = {k: v for k, v in checkpoint.options.items() if k not in _DERIVED}
    options["use_gpu"] = torch.cuda.is_available()
    negatives = checkpoint.options.get("train_neg_sample_args")
    if isinstance(negatives, dict) and negatives.get("distribution") != "none":
        options["train_neg_sample_args"] = negatives
    folder = checkpoint.options.get("data_path")
    if folder and checkpoint.dataset != "ml-100k":
        options["data_path"] = str(Path(folder).parent)  # RecBole has added the data set's name
    return options
