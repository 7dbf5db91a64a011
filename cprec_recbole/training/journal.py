"""`last.pth`: the latest state of a training, from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cprec_recbole.config import CompressionError
from cprec_recbole.data.sequences import SequenceRows
from cprec_recbole.files import write_whole
from cprec_recbole.parallel import group
from cprec_recbole.saving.vocabulary import numbering

LAST, BEST, RESULT = "last.pth", "best.pth", "result.json"
_FORMAT = 2
# options that change what is shown, or where things are, and nothing of the training
_WITHOUT_EFFECT = frozenset(
    {
        *("show_progress", "state", "verbose", "log_wandb", "wandb_project", "checkpoint_steps"),
        *("gpu_id", "use_gpu", "local_rank", "world_size", "single_spec", "config_files"),
        *("data_path", "checkpoint_dir", "save_dataset", "dataset_save_path"),
        *("save_dataloaders", "dataloaders_save_path"),
    }
)


class Journal:
    """Where a training writes its state down; only the first process writes.

    Args:
        folder: for `last.pth`.
        terms: what has to be the same when a run is resumed, by name, as text.
        every: steps of an epoch between two writings; 0 for none within an epoch.
    """

    def __init__(self, folder: Path, terms: Mapping[str, str], every: int = 0) -> None:
        self.path = folder / LAST
        self.terms = dict(terms)
        self.every = every

    def is_due(self, step: int) -> bool:
        """Whether to write after the `step`-th step of an epoch, from 1."""
        return self.every > 0 and step % self.every == 0

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace what was written before, in one step.

        Raises:
            CompressionError: a file that cannot be written.
        """
        if not group.is_first():
            return
        whole = {"format": _FORMAT, "terms": self.terms, **state}
        try:
            write_whole(self.path, lambda file: torch.save(whole, file))
        except (OSError, RuntimeError) as error:
            raise CompressionError(
                f"Expected `out` to be a folder that can be written, but {self.path} cannot be: "
                f"{error}."
            ) from error

    def read(self) -> dict[str, Any] | None:
        """The state that was written last; None where none was.

        Raises:
            CompressionError: a file that is cut short or damaged, or of a run with other terms.
        """
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            terms, written = state["terms"], state["format"]
        except Exception as error:  # damage to a zip or a pickle may raise any
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CompressionError(
                f"Expected {self.path} to be whole, but it is cut short or damaged: {reason} "
                "Start afresh in another folder."
            ) from error
        if written != _FORMAT:
            raise CompressionError(
                f"Expected {self.path} to be of format {_FORMAT}, but got {written}: "
                "another version of cprec_recbole wrote it."
            )
        _compare(terms, self.terms)
        return state


def _compare(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise a CompressionError that names the first option that is not what it was."""
    for name in sorted({*then, *now}):
        before, after = then.get(name, "none"), now.get(name, "none")
        if before == after:
            continue
        if name == "rows":
            raise CompressionError(
                "Expected `dataset` to hold the interactions with which the run began, but they "
                "have changed; start afresh in another folder."
            )
        raise CompressionError(
            f"Expected `{name}` to be {before}, with which the run began, but got {after}; resume "
            "with the same options, or start afresh in another folder."
        )


def terms_of(config: Any, loaders: tuple[Any, ...]) -> dict[str, str]:
    """What decides how a training ends: options, the number of processes, the data.

    Args:
        config: a RecBole config.
        loaders: RecBole's loaders of the training, validation and test rows.
    """
    final = config.final_config_dict
    terms = {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in final.items()
        if name not in _WITHOUT_EFFECT
    }
    terms |= {"nproc": str(group.size()), "device": config["device"].type}
    return terms | {"rows": digest(loaders)}


def digest(loaders: tuple[Any, ...]) -> str:
    """A checksum of all rows that loaders read."""
    dataset = loaders[0]._dataset
    found = hashlib.sha256(numbering(dataset, dataset.iid_field).encode())
    for loader in loaders:
        feat = loader._dataset.inter_feat
        columns = feat.columns_kept() if isinstance(feat, SequenceRows) else feat.interaction
        for name in sorted(columns):
            found.update(name.encode())
            found.update(np.ascontiguousarray(columns[name].numpy()).tobytes())
    return found.hexdigest()
