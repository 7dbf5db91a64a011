"""One trial: train a model or make one of a trained model, measure it, write one file."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from recbole.config import Config
from recbole.utils import init_seed
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import nn

from cprec_recbole.compare.contenders import (
    STOCK_KIND,
    UNCOMPRESSED_RECIPE,
    Recipe,
    build,
    derive,
    finished,
)
from cprec_recbole.compare.results import TRIALS, pack_users
from cprec_recbole.compare.spec import SETTINGS, Cell, Record, Trial
from cprec_recbole.compare.tables import served_bytes
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.costs import part_sizes, shared_layers
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.environment import environment
from cprec_recbole.files import make_folder, remove_leftovers, write_text, write_whole
from cprec_recbole.host.library import (
    recbole_config,
    recbole_dataset,
    recbole_loaders,
    working_directory,
)
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import check_topk, evaluate
from cprec_recbole.training.ranking import by_popularity, by_user, rank_targets
from cprec_recbole.training.state import BEST, LAST, Journal, digest, terms_of
from cprec_recbole.training.trainer import CompressedTrainer

WEIGHTS, UNFINISHED = "weights", "unfinished"  # in the folder of a study
OnEpoch = Callable[[int, float], None]  # epoch from 1, validation score
_SCORE_REPEATS, _WARM_UP = 50, 5  # the first calls warm caches up


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

    @property
    def rows(self) -> str:
        """A checksum of all interactions."""
        return digest((self.train, self.valid, self.test))


def config_of(
    cell: Cell,
    options: dict[str, Any],
    data_path: str | None,
    *,
    recipe: Recipe = UNCOMPRESSED_RECIPE,
    seed: int = 0,
    rate: float | None = None,
) -> Config:
    """RecBole's config of a trial.

    Args:
        cell: model, data and length.
        options: RecBole's, the same for all contenders.
        data_path: where data sets are; None for RecBole's own place.
        recipe: what is trained; for what is made of a trained model, that model.
        seed: of the training.
        rate: learning rate; None for RecBole's.
    """
    given = {"metric_decimal_place": 6, **options}  # RecBole's 4 make ties of rates
    given |= {"MAX_ITEM_LIST_LENGTH": cell.length, "seed": seed}
    given |= {} if rate is None else {"learning_rate": rate}
    given |= {} if data_path is None else {"data_path": data_path}
    if recipe.kind == STOCK_KIND:
        given = {k: v for k, v in given.items() if k not in CompressionConfig.option_names()}
        return recbole_config(cell.model, cell.dataset, given, [str(SETTINGS)])
    own = UNCOMPRESSED_RECIPE.options if recipe.is_derived else recipe.options
    given |= {name: value for name, value in own.items() if name != "dtype"}
    return recbole_config(f"Cp{cell.model}", cell.dataset, given, [str(SETTINGS)])


def run_trial(
    trial: Trial, parent: Record | None, folder: Path, data_path: str | None, on_epoch: OnEpoch
) -> None:
    """Train or derive, measure, and write the trial's file, and the weights of an uncompressed
    model.

    Args:
        trial: what to do.
        parent: the record of what it is made of.
        folder: of the study.
        data_path: where data sets are; None for RecBole's own place.
        on_epoch: called after each evaluation.

    Raises:
        Exception: whatever went wrong; nothing is kept then, but for the state of a training that
            was interrupted.
    """
    logging.getLogger("recbole").setLevel(logging.ERROR)
    start = perf_counter()
    given = trial.cell, trial.options, data_path
    config = config_of(*given, recipe=trial.recipe, seed=trial.seed, rate=trial.rate)
    data = Data.of(config)
    if data.rows != trial.rows:
        raise CompressionError(
            f"Expected `data_path` to hold the interactions with which the study of {trial.cell} "
            "began, but they have changed; use another --out, or restore them."
        )
    init_seed(trial.seed, config["reproducibility"])
    with _unfinished(folder / UNFINISHED / trial.name) as place:
        if parent is None:
            model, record = fit(config, data, place, on_epoch, trial.recipe)
        else:
            model, record = _derived(trial, parent, folder, config, data)
        plain = build(UNCOMPRESSED_RECIPE, config_of(*given), data.train._dataset)
        record |= _measured(model, plain, data, config)
        record["seconds"] = perf_counter() - start
        if trial.recipe == UNCOMPRESSED_RECIPE:
            write_whole(weights_of(folder, trial.name), lambda to: save_weights(model, to))
        write_record(folder, trial, record)  # last: with it the trial is finished


def write_record(folder: Path, trial: Trial, record: Record) -> None:
    """Write what was found, or an `error`, beside the trial's place, and rename it."""
    about: Record = {"cell": str(trial.cell), **asdict(trial.recipe)}
    about |= {"learning_rate": trial.rate, "seed": trial.seed, "parent": trial.parent}
    text = json.dumps({**about, **record}, indent=1, allow_nan=False, default=str) + "\n"
    write_text(folder / TRIALS / f"{trial.name}.json", text)


def weights_of(folder: Path, name: str) -> Path:
    """Where the weights of an uncompressed model are."""
    return folder / WEIGHTS / f"{name}.safetensors"


@contextmanager
def _unfinished(folder: Path) -> Any:
    """Where a training keeps its state; it is removed once that has ended, or has failed for what
    would make it fail again, and stays where it was interrupted."""
    make_folder(folder)
    try:
        yield folder
    except ValueError:  # a loss that is no number, or options that cannot be
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def fit(
    config: Config,
    data: Data,
    place: Path,
    on_epoch: OnEpoch = lambda epoch, score: None,
    recipe: Recipe = UNCOMPRESSED_RECIPE,
) -> tuple[nn.Module, Record]:
    """Train a model from scratch and measure its quality.

    Args:
        config: RecBole's, with the options of the recipe.
        data: made for that config.
        place: a folder where the training keeps its state. Where it holds one of the same options,
            data, machine and versions, the training goes on from there, and ends as it would have.
        on_epoch: called after each evaluation.
        recipe: what is trained.

    Returns:
        The model with its best epoch's weights, or what its recipe makes of that; metrics, the
        validation curve, epochs and seconds.
    """
    place = place.resolve()  # RecBole makes it again, from wherever it is
    model = build(recipe, config, data.train._dataset).to(config["device"])
    config["checkpoint_dir"] = str(place)
    with working_directory(str(place)):  # RecBole's trainer logs into the current folder
        trainer = _MeasuredTrainer(config, model)
    trainer.saved_model_file = str(place / BEST)
    terms = terms_of(config, (data.train, data.valid, data.test))
    terms["environment"] = json.dumps(environment(config["device"]))
    trainer.journal = Journal(place, terms)
    for name in (BEST, LAST):
        remove_leftovers(place / name)
    try:
        state = trainer.journal.read()
    except CompressionError:  # damaged, or of something else: it is trained from the start
        state = None
    if state is not None and (state["best_valid_result"] is None or (place / BEST).is_file()):
        trainer.resume(state, data.valid)
    trainer.fit(
        data.train,
        data.valid,
        verbose=False,
        callback_fn=lambda epoch, score: on_epoch(epoch + 1, float(score)),
    )
    test = trainer.evaluate(data.test)  # with the best epoch's weights, which it loads
    valid = trainer.best_valid_result
    made = finished(recipe, model)
    is_itself = made is model
    if not is_itself:
        valid, test = evaluate(made, data.valid), evaluate(made, data.test)
    return made, {
        "valid": _plain(valid),
        "test": _plain(test),
        "valid_curve": trainer.valid_scores,
        "curve_metric": str(config["valid_metric"]).lower(),
        "eval_step": min(int(config["eval_step"]), int(config["epochs"])),  # as RecBole does
        "best_epoch": trainer.best_epoch(),
        "epochs": len(trainer.epoch_seconds),
        "epoch_seconds": trainer.epoch_seconds,
        "checkpoint_bytes": os.path.getsize(trainer.saved_model_file) if is_itself else None,
    }


def _derived(
    trial: Trial, parent: Record, folder: Path, config: Config, data: Data
) -> tuple[nn.Module, Record]:
    """A model out of a trained uncompressed one."""
    assert trial.parent is not None
    original: Any = build(UNCOMPRESSED_RECIPE, config, data.train._dataset)
    path = weights_of(folder, trial.parent[0])
    try:
        load_model(original, str(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CompressionError(
            f"Expected {path} to hold the weights of the uncompressed model, but got: {error}. "
            "It was removed; --retry trains that model again."
        ) from error
    original = original.to(config["device"]).eval()
    start = perf_counter()
    model, recovery = derive(
        trial.recipe,
        original,
        data.train,
        data.valid,
        parent["best_epoch"],
        trial.seed,
        trial.rate,
        compression_of(config).loss_memory,
    )
    seconds = perf_counter() - start
    curve = [] if recovery is None else [epoch[recovery.metric] for epoch in recovery.epochs]
    return model, {
        "valid": evaluate(model, data.valid),
        "test": evaluate(model, data.test),
        "valid_curve": curve,
        "curve_metric": str(config["valid_metric"]).lower(),
        "eval_step": 1,
        "best_epoch": 0 if recovery is None else recovery.kept,
        "epochs": len(curve),
        # evaluation included, as recover() does both
        "epoch_seconds": [seconds / len(curve) for _ in curve],
    }


def _measured(model: nn.Module, plain: nn.Module, data: Data, config: Config) -> Record:
    """Sizes, latency, also of a plain uncompressed model beside it, and quality by user and by
    popularity."""
    times = score_times([model, plain.to(config["device"])], next(iter(data.test))[0])
    found: Record = {
        "parameters": {k: v for k, v in part_sizes(model).as_dict().items() if k != "total"},
        "bytes": served_bytes(model),
        "score_ms": times[0],
        "plain_ms": times[1],
        "environment": environment(config["device"]),
    }
    if not isinstance(model, CompressedRecommender):
        return found | {"sharing": "none", "weight_bytes": _pickled_bytes(model)}
    table: nn.Module = model.table
    if isinstance(table, BlockEmbedding):
        blocks = {"items": list(table.partition.sizes), "ranks": list(table.ranks)}
        found["blocks"] = blocks  # as a budget may have chosen them
    users, targets, places = rank_targets(model, data.test)
    return found | {
        "sharing": shared_layers(model),
        # layers are in int8 in a folder, and nowhere else
        "weight_bytes": None if model.table.is_int8 else _pickled_bytes(model),
        "popularity": by_popularity(targets, places, item_counts(data.train._dataset)),
        "users": pack_users(by_user(users, places)),
    }


class _MeasuredTrainer(CompressedTrainer):
    """RecBole's trainer with a clock around its training epochs, and without its event files."""

    tensorboard: Any
    eval_step: int
    valid_metric_bigger: bool

    def __init__(self, config: Config, model: nn.Module) -> None:
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
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


@torch.no_grad()
def score_times(models: Sequence[nn.Module], users: Any) -> list[float]:
    """Median milliseconds to score the catalogue for one user out of rows of evaluation data,
    `[models]`. Models take turns: a machine that slows down slows all of them."""
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(_SCORE_REPEATS + _WARM_UP):
        row = repeat % len(users)
        for model, own in zip(models, times):
            model.eval()
            device = next(model.parameters()).device
            user = users[slice(row, row + 1)].to(device)
            start = perf_counter()
            model.full_sort_predict(user)  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize()
            own.append(1e3 * (perf_counter() - start))
    return [median(own[_WARM_UP:]) for own in times]


def save_weights(model: nn.Module, path: Path) -> None:
    """Write what safetensors' `load_model` reads: each parameter once, by a copy of its own, since
    on a GPU those of a recurrent layer are parts of one storage, which `save_model` refuses."""
    kept = model.state_dict()
    unique = [*model.named_parameters(), *model.named_buffers()]
    plain = {n: t.detach().cpu() for n, t in unique if n in kept}
    contiguous = torch.contiguous_format
    save_file({n: t.clone(memory_format=contiguous) for n, t in plain.items()}, path)


def _pickled_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def _plain(result: Any) -> dict[str, float]:
    return {name: float(value) for name, value in (result or {}).items()}
