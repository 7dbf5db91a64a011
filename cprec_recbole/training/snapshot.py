"""The whole state of a training at one moment, taken and put back.

What is taken holds plain values and tensors only, so that reading it from a file runs no code.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.parallel import group
from cprec_recbole.parallel.spread import own_rows, spread_as


@dataclass(frozen=True)
class Moment:
    """A place in a training.

    Attributes:
        epoch: from 0.
        step: steps of that epoch that are done.
        loss: their losses, added up; this process's part.
        generator: the state of the training loader's generator when the epoch began, from which
            its order of the rows follows.
        scaler: the state of the gradient scaler.
        ended: the training is over, early or not.
        random: the random states at this moment, where there is a training to be put back.
    """

    epoch: int
    step: int
    loss: float
    generator: Tensor
    scaler: dict[str, Any]
    ended: bool = False
    random: dict[str, Any] | None = None

    def later(self, step: int, loss: float, scaler: dict[str, Any]) -> Moment:
        """A moment of the same epoch."""
        return replace(self, step=step, loss=loss, scaler=scaler, random=None)


def take(trainer: Any, moment: Moment) -> dict[str, Any]:
    """The state of a trainer; to be called on every process, and whole on the first."""
    mine: dict[str, Any] = {"loss": moment.loss, "random": random_state(trainer.device)}
    parts = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    if trainer.is_parted:  # each process has to get its own rows back
        mine |= _own(parts)
    result = trainer.best_valid_result
    valid = getattr(trainer.valid_data, "generator", None)
    return {
        "epoch": moment.epoch,
        "step": moment.step,
        "generator": moment.generator,
        "valid_generator": None if valid is None else valid.get_state(),
        "scaler": moment.scaler,
        "ended": moment.ended,
        "cur_step": trainer.cur_step,
        "best_valid_score": float(trainer.best_valid_score),
        "best_valid_result": result and {name: float(value) for name, value in result.items()},
        "train_loss": {epoch: float(loss) for epoch, loss in trainer.train_loss_dict.items()},
        "measured": {name: list(values) for name, values in trainer.measured.items()},
        "other_parameter": trainer.model.other_parameter(),
        "processes": group.gather(mine),
        **({} if trainer.is_parted else parts),
    }


def restore(trainer: Any, state: dict[str, Any], train_data: Any) -> Moment:
    """Put a state back; returns the moment at which it was taken.

    The generator of `train_data` and the random states are put back when the epoch begins.
    """
    mine = state["processes"][group.rank()]
    parts = mine if trainer.is_parted else state
    spread = trainer.model.state_dict()
    weights = {name: spread_as(rows, spread[name]) for name, rows in parts["model"].items()}
    trainer.model.load_state_dict(weights)
    trainer.model.load_other_parameter(state["other_parameter"])
    trainer.optimizer.load_state_dict(parts["optimizer"])
    _spread_moments(trainer.optimizer)
    trainer.cur_step = state["cur_step"]
    trainer.best_valid_score = state["best_valid_score"]
    trainer.best_valid_result = state["best_valid_result"]
    trainer.train_loss_dict = dict(state["train_loss"])
    for name, values in state.get("measured", {}).items():  # earlier versions wrote none
        trainer.measured[name][:] = values
    if state["valid_generator"] is not None and trainer.valid_data is not None:
        trainer.valid_data.generator.set_state(state["valid_generator"])
    return Moment(
        state["epoch"],
        state["step"],
        mine["loss"],
        state["generator"],
        state["scaler"],
        state["ended"],
        mine["random"],
    )


def _own(value: Any) -> Any:
    """A state with this process's rows in place of tensors that are spread over processes."""
    if isinstance(value, Tensor):
        return own_rows(value)
    if isinstance(value, dict):
        return {key: _own(part) for key, part in value.items()}
    return [_own(part) for part in value] if isinstance(value, list) else value


def _spread_moments(optimizer: Any) -> None:
    """Spread what an optimizer keeps of a parameter as the parameter is."""
    for part in getattr(optimizer, "parts", {"all": optimizer}).values():
        for parameter, kept in part.state.items():
            shape = own_rows(parameter).shape
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    kept[name] = spread_as(value, parameter)


def random_state(device: torch.device) -> dict[str, Any]:
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
    """Put the states back that `random_state` gave."""
    version, words, gauss = state["python"]
    name, keys, *others = state["numpy"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state((name, keys.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
