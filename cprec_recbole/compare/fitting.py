"""Training one model for a comparison: RecBole's trainer, measured."""

from __future__ import annotations

import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

from cprec_recbole.compare.controls import TrainedControl
from cprec_recbole.compare.results import environment
from cprec_recbole.config import CompressionError
from cprec_recbole.files import make_folder, remove_leftovers
from cprec_recbole.host.library import (
    recbole_dataset,
    recbole_loaders,
    recbole_model,
    working_directory,
)
from cprec_recbole.training.evaluation import check_topk, evaluate
from cprec_recbole.training.state import BEST, LAST, Journal, terms_of
from cprec_recbole.training.trainer import CompressedTrainer

SCORE_REPEATS = 50
_WARM_UP = 5  # the first calls warm caches up


@dataclass(frozen=True)
class Data:
    """RecBole's data set and its three loaders."""

    dataset: Any
    train: Any
    valid: Any
    test: Any

    @classmethod
    def of(cls, config: Config) -> Data:
        """Read, filter and split as RecBole does; draws are those of the config's seed."""
        init_seed(config["seed"], config["reproducibility"])
        dataset = recbole_dataset(config)
        loaders = recbole_loaders(config, dataset)
        check_topk(config, dataset)
        for name, loader in zip(("validation", "test"), loaders[1:]):
            if not len(loader):
                raise CompressionError(
                    f"Expected `eval_args` to leave rows out for {name}, but got "
                    f"{config['eval_args']['split']}; choose another split, such as "
                    "{LS: valid_and_test}."
                )
        return cls(dataset, *loaders)


@dataclass(frozen=True)
class Fitted:
    """What a training came to.

    Attributes:
        model: the model with its best epoch's weights, or what its control made of that.
        valid: metrics on the validation set at the best epoch.
        test: metrics on the test set.
        valid_curve: the validation metric after each evaluation.
        best_epoch: the epoch whose weights were kept, counted from 1.
        epoch_seconds: seconds of each training epoch, evaluation not included.
        checkpoint_bytes: bytes of RecBole's checkpoint; 0 where that is another model.
    """

    model: torch.nn.Module
    valid: dict[str, float]
    test: dict[str, float]
    valid_curve: list[float]
    best_epoch: int
    epoch_seconds: list[float]
    checkpoint_bytes: int


def fit(
    config: Config,
    data: Data,
    on_epoch: Callable[[int, float], None],
    control: TrainedControl | None = None,
    folder: Path | None = None,
) -> Fitted:
    """Build a model, train it and test it.

    Args:
        config: RecBole's.
        data: made for that config.
        on_epoch: called after each evaluation with epoch and validation score.
        control: what builds and finishes the model; None: RecBole builds it.
        folder: where the training's state is written as each epoch begins; where it holds one of
            the same options and data, the training goes on from there and ends as it would have.
            None: nothing is kept.
    """
    if control is None:
        model = recbole_model(config, data.train._dataset)
    else:
        model = control.build(config, data.train._dataset)
    model = model.to(config["device"])
    with _kept_or_temporary(folder) as place:
        config["checkpoint_dir"] = str(place)
        with working_directory(str(place)):  # RecBole's trainer logs into the current folder
            trainer = _MeasuredTrainer(config, model)
        unfinished = folder is None or _goes_on(trainer, place, data)
        if unfinished:
            trainer.fit(
                data.train,
                data.valid,
                verbose=False,
                callback_fn=lambda epoch, score: on_epoch(epoch, float(score)),
            )
        else:
            trainer.eval_collector.data_collect(data.train)  # as `fit` begins
        test = trainer.evaluate(data.test)  # with the best epoch's weights, which it loads
        checkpoint_bytes = os.path.getsize(trainer.saved_model_file)
    found = Fitted(
        model=model,
        valid=_plain(trainer.best_valid_result),
        test=_plain(test),
        valid_curve=trainer.valid_scores,
        best_epoch=trainer.best_epoch(),
        epoch_seconds=trainer.epoch_seconds,
        checkpoint_bytes=checkpoint_bytes,
    )
    finished = model if control is None else control.finished(model)
    if finished is model:
        return found
    valid, test = evaluate(finished, data.valid), evaluate(finished, data.test)
    return replace(found, model=finished, valid=valid, test=test, checkpoint_bytes=0)


@contextmanager
def _kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    """A folder that stays, or one that does not."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    else:
        make_folder(folder)
        yield folder.resolve()  # RecBole makes it again, from wherever it is


def _goes_on(trainer: _MeasuredTrainer, folder: Path, data: Data) -> bool:
    """Have a training kept in a folder, and go on with what is there; whether any is left to do."""
    best = folder / BEST
    for path in (best, folder / LAST):
        remove_leftovers(path)
    trainer.saved_model_file = str(best)
    terms = terms_of(trainer.config, (data.train, data.valid, data.test))
    # another machine or version would not end where this one does
    where = {"environment": json.dumps(environment(trainer.config["device"]))}
    trainer.journal = _Willing(folder, terms | where)
    try:
        state = trainer.journal.read()
    except CompressionError:  # damaged, or of other data: it is trained from the start
        return True
    if state is None or (state["best_valid_result"] is not None and not best.is_file()):
        return True
    try:
        return trainer.resume(state, data.valid)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CompressionError(
            f"Expected {folder / LAST} to be of this model, but got {type(error).__name__}: "
            f"{error}."
        ) from error


class _Willing(Journal):
    """A journal without which a training goes on, as where the disk is full."""

    def write(self, state: Mapping[str, Any]) -> None:
        try:
            super().write(state)
        except CompressionError as error:
            warnings.warn(f"{error} The training goes on without it.", stacklevel=2)


class _MeasuredTrainer(CompressedTrainer):
    """RecBole's trainer with a clock around its training epochs, and without its event files."""

    tensorboard: Any
    eval_step: int
    valid_metric_bigger: bool

    def __init__(self, config: Config, model: torch.nn.Module) -> None:
        super().__init__(config, model)
        self.tensorboard.close()
        self.tensorboard = _NoTensorboard()
        self.epoch_seconds: list[float] = []
        self.valid_scores: list[float] = []
        self.measured = {"epoch_seconds": self.epoch_seconds, "valid_scores": self.valid_scores}
        self._began = 0.0

    def _begin(self, *args: Any, **kwargs: Any) -> Any:
        begin = super()._begin(*args, **kwargs)
        self._began = perf_counter()  # the state has been written by then
        return begin

    def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        loss = super()._train_epoch(*args, **kwargs)
        self.epoch_seconds.append(perf_counter() - self._began)
        return loss

    def _valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
        score, result = super()._valid_epoch(*args, **kwargs)
        self.valid_scores.append(float(score))
        return score, result

    def best_epoch(self) -> int:
        """The epoch whose weights were kept, counted from 1; of equal ones the last."""
        sign = 1 if self.valid_metric_bigger else -1
        best = max(range(len(self.valid_scores)), key=lambda i: (sign * self.valid_scores[i], i))
        return (best + 1) * self.eval_step


class _NoTensorboard:
    def add_scalar(self, *args: Any) -> None:
        """Nothing is kept."""

    def add_hparams(self, *args: Any) -> None:
        """Nothing is kept."""


@torch.no_grad()
def score_times(models: Sequence[torch.nn.Module], users: Sequence[Interaction]) -> list[float]:
    """Median milliseconds to score the catalogue for one user, `[models]`; models take turns, so
    that a machine that slows down slows all of them.

    Args:
        models: they are put into eval mode.
        users: rows of evaluation data for each model.
    """
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(SCORE_REPEATS + _WARM_UP):
        for model, rows, own in zip(models, users, times):
            model.eval()
            device = next(model.parameters()).device
            row = repeat % len(rows)
            user = rows[slice(row, row + 1)].to(device)
            start = perf_counter()
            model.full_sort_predict(user)  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= _WARM_UP:
                own.append(1e3 * (perf_counter() - start))
    return [median(own) for own in times]


def pickled_bytes(state: dict[str, Any]) -> int:
    """Bytes of a state as torch saves it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def _plain(result: Any) -> dict[str, float]:
    return {name: float(value) for name, value in (result or {}).items()}
