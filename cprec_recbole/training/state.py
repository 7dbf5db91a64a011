"""`last.pth`: the latest state of a training, from which an interrupted run goes on.

It holds plain values and tensors only, so that reading it runs no code.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.data.sequences import SequenceRows
from cprec_recbole.files import write_whole
from cprec_recbole.host.numbering import numbering
from cprec_recbole.parallel import group
from cprec_recbole.training.evaluation import plain

LAST, BEST, RESULT = "last.pth", "best.pth", "result.json"
_FORMAT = 2
# options that change nothing of a training: what is shown, which devices work, where things are
_SHOWN = ["show_progress", "state", "verbose", "log_wandb", "wandb_project"]
_DEVICES = ["gpu_id", "use_gpu", "local_rank", "world_size", "single_spec"]
_PLACES = ["config_files", "data_path", "checkpoint_dir", "dataset_save_path"]
_SAVED = ["checkpoint_steps", "save_dataset", "save_dataloaders", "dataloaders_save_path"]
_WITHOUT_EFFECT = {*_SHOWN, *_DEVICES, *_PLACES, *_SAVED}
_OF_EACH = ("loss", "random")  # of a Progress, what is another for each process


class Progress(NamedTuple):
    """How far a training is."""

    epoch: int  # from 0
    step: int  # steps of that epoch that are done
    loss: float  # the sum of their losses; this process's part
    generator: Tensor  # the training loader's as the epoch began: the order of the rows follows
    scaler: dict[str, Any]  # the state of the gradient scaler
    ended: bool = False  # the training is over, early or not
    random: Any = None  # the random states to put back, if any


def state_of(trainer: Any, progress: Progress) -> dict[str, Any]:
    """The whole state of a trainer; every process has to call it, and the first has all of it."""
    shared = progress._asdict()
    mine = {name: shared.pop(name) for name in _OF_EACH}
    mine["random"] = _random_state(trainer.device)
    valid = getattr(trainer.valid_data, "generator", None)
    return {
        **shared,
        "valid_generator": None if valid is None else valid.get_state(),
        "cur_step": trainer.cur_step,
        "best_valid_score": float(trainer.best_valid_score),
        "best_valid_result": plain(trainer.best_valid_result),
        "train_loss": {epoch: float(loss) for epoch, loss in trainer.train_loss_dict.items()},
        "measured": {name: list(values) for name, values in trainer.measured.items()},
        "other_parameter": trainer.model.other_parameter(),
        "processes": group.gather(mine),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
    }


def restore(trainer: Any, state: dict[str, Any]) -> Progress:
    """Put a state back, but the generator of the training data and the random states, for which it
    is time when the epoch begins; returns how far the training was."""
    trainer.model.load_state_dict(state["model"])
    trainer.model.load_other_parameter(state["other_parameter"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.cur_step = state["cur_step"]
    trainer.best_valid_score = state["best_valid_score"]
    trainer.best_valid_result = state["best_valid_result"]
    trainer.train_loss_dict = dict(state["train_loss"])
    for name, values in state.get("measured", {}).items():  # earlier versions wrote none
        trainer.measured[name][:] = values
    if state["valid_generator"] is not None and trainer.valid_data is not None:
        trainer.valid_data.generator.set_state(state["valid_generator"])
    found = {**state, **state["processes"][group.rank()]}
    return Progress(**{name: found[name] for name in Progress._fields})


def _random_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators that a training draws from."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, keys, *others = numpy_state
    return {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *others),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the random states of a `Progress` back."""
    version, words, gauss = state["python"]
    name, keys, *others = state["numpy"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state((name, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


class Journal:
    """Where a training writes its state; only the first process writes.

    Args:
        folder: for `last.pth`.
        terms: what has to be the same when a run is resumed, by name, as text.
        every: steps of an epoch between two writings; 0 for none within an epoch.
    """

    def __init__(self, folder: Path, terms: Mapping[str, str], every: int = 0) -> None:
        self.path, self.terms, self.every = folder / LAST, dict(terms), every

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace what was written before, in one step; a CompressionError where that cannot be."""
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
        """The state that was written last; None where none was. A CompressionError for a file that
        is cut short or damaged, or of a run with other terms."""
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
        for name in sorted({*terms, *self.terms}):
            then, now = terms.get(name, "none"), self.terms.get(name, "none")
            if then != now and name == "rows":
                raise CompressionError(
                    "Expected `dataset` to hold the interactions with which the run began, but "
                    "they have changed; start afresh in another folder."
                )
            if then != now:
                raise CompressionError(
                    f"Expected `{name}` to be {then}, with which the run began, but got {now}; "
                    "resume with the same options, or start afresh in another folder."
                )
        return state


def terms_of(config: Any, loaders: tuple[Any, ...]) -> dict[str, str]:
    """What decides how a training ends: RecBole's options, the number of processes, the rows of the
    loaders for training, validation and test."""
    terms = {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in config.final_config_dict.items()
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
