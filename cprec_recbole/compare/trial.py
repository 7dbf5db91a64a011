"""One trial: train a model or make one of a trained model, measure it, write one file."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from recbole.config import Config
from recbole.utils import init_seed
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import nn

from cprec_recbole.compare import contenders
from cprec_recbole.compare.contenders import STOCK_KIND, UNCOMPRESSED_RECIPE, Recipe
from cprec_recbole.compare.results import TRIALS, pack_users
from cprec_recbole.compare.spec import SETTINGS, Cell, Record, Trial
from cprec_recbole.compare.tables import served_bytes
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.costs import part_sizes, shared_layers
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.environment import environment
from cprec_recbole.files import make_folder, remove_leftovers, write_text, write_whole
from cprec_recbole.host import library
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import check_topk, evaluate, plain, valid_metric
from cprec_recbole.training.ranking import by_popularity, by_user, rank_targets
from cprec_recbole.training.state import BEST, LAST, Journal, digest, terms_of
from cprec_recbole.training.trainer import CompressedTrainer

WEIGHTS, UNFINISHED = "weights", "unfinished"  # in the folder of a study
OnEpoch = Callable[[int, float], None]  # epoch from 1, validation score
_SCORE_REPEATS, _WARM_UP = 50, 5  # the first calls warm caches up


class Data(NamedTuple):
    """RecBole's data set and its three loaders."""

    dataset: Any
    train: Any
    valid: Any
    test: Any

    @classmethod
    def of(cls, config: Config) -> Data:
        """Read, filter and split as RecBole does; draws are those of the config's seed."""
        init_seed(config["seed"], config["reproducibility"])
        dataset = library.recbole_dataset(config)
        data = cls(dataset, *library.recbole_loaders(config, dataset))
        check_topk(config, dataset)
        for name, loader in (("validation", data.valid), ("test", data.test)):
            if not len(loader):
                raise CompressionError(
                    f"Expected `eval_args` to leave rows out for {name}, but got "
                    f"{config['eval_args']['split']}; choose another split, such as "
                    "{LS: valid_and_test}."
                )
        return data

    @property
    def rows(self) -> str:
        """A checksum of all interactions."""
        return digest(self[1:])

    def check_rows(self, cell: Cell, rows: str) -> None:
        """Raise a CompressionError unless this is the checksum of a cell's interactions."""
        if self.rows != rows:
            raise CompressionError(
                f"Expected `data_path` to hold the interactions with which the study of {cell} "
                "began, but they have changed; use another --out, or restore them."
            )


def config_of(
    cell: Cell,
    options: dict[str, Any],
    data_path: str | None,
    *,
    recipe: Recipe = UNCOMPRESSED_RECIPE,
    seed: int = 0,
    rate: float | None = None,
) -> Config:
    """RecBole's config of a trial in a cell, with the options that all contenders share; of what is
    made of a trained model, that model's. None: RecBole's own place of data, its own rate."""
    given = {"metric_decimal_place": 6, **options}  # RecBole's 4 make ties of rates
    given |= {"MAX_ITEM_LIST_LENGTH": cell.length, "seed": seed}
    given |= {} if rate is None else {"learning_rate": rate}
    given |= {} if data_path is None else {"data_path": data_path}
    if recipe.kind == STOCK_KIND:
        given = {k: v for k, v in given.items() if k not in CompressionConfig.option_names()}
        return library.recbole_config(cell.model, cell.dataset, given, [str(SETTINGS)])
    own = UNCOMPRESSED_RECIPE.options if recipe.is_derived else recipe.options
    given |= {"negatives": 0} if own["softmax"] == "tree" else {}  # it reads few items as it is
    given |= {name: value for name, value in own.items() if name != "dtype"}
    return library.recbole_config(f"Cp{cell.model}", cell.dataset, given, [str(SETTINGS)])


def run_trial(
    trial: Trial, parent: Record | None, folder: Path, data_path: str | None, on_epoch: OnEpoch
) -> None:
    """Train or derive, measure, and write the trial's file into the study's folder, and the weights
    of an uncompressed model. `parent` is the record of what it is made of; `on_epoch` is called
    after each evaluation. Raises whatever went wrong; nothing is kept then, but for the state of a
    training that was interrupted."""
    logging.getLogger("recbole").setLevel(logging.ERROR)
    start = perf_counter()
    given = trial.cell, trial.options, data_path
    config = config_of(*given, recipe=trial.recipe, seed=trial.seed, rate=trial.rate)
    data = Data.of(config)
    data.check_rows(trial.cell, trial.rows)
    init_seed(trial.seed, config["reproducibility"])
    place = folder / UNFINISHED / trial.name  # it stays where a training is interrupted
    make_folder(place)
    try:
        if parent is None or trial.parent is None:
            model, record = fit(config, data, place, on_epoch, trial.recipe)
        else:
            path = weights_of(folder, trial.parent[0])
            model, record = _derived(trial, parent, path, config, data)
        whole = contenders.build(UNCOMPRESSED_RECIPE, config_of(*given), data.train._dataset)
        record |= _measured(model, whole, data, config)
        record["seconds"] = perf_counter() - start
        if trial.recipe == UNCOMPRESSED_RECIPE:
            write_whole(weights_of(folder, trial.name), lambda to: save_weights(model, to))
        write_record(folder, trial, record)  # with it the trial is finished
    except ValueError:  # a loss that is no number, or options that cannot be: it would fail again
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)


def write_record(folder: Path, trial: Trial, record: Record) -> None:
    """Write what was found, or an `error`, beside the trial's place, and rename it."""
    about: Record = {"cell": str(trial.cell), **asdict(trial.recipe)}
    about |= {"learning_rate": trial.rate, "seed": trial.seed, "parent": trial.parent}
    text = json.dumps({**about, **record}, indent=1, allow_nan=False, default=str) + "\n"
    write_text(folder / TRIALS / f"{trial.name}.json", text)


def weights_of(folder: Path, name: str) -> Path:
    """Where the weights of an uncompressed model are."""
    return folder / WEIGHTS / f"{name}.safetensors"


def fit(
    config: Config,
    data: Data,
    place: Path,
    on_epoch: OnEpoch = lambda epoch, score: None,
    recipe: Recipe = UNCOMPRESSED_RECIPE,
) -> tuple[nn.Module, Record]:
    """Train a model from scratch, by RecBole's config with the options of a recipe; returns it with
    its best epoch's weights, or what its recipe makes of that, and metrics, the validation curve,
    epochs and seconds. `place` is a folder where the training keeps its state. Where it holds one
    of the same options, data, machine and versions, the training goes on, and ends as it would
    have. `on_epoch` is called after each evaluation."""
    place = place.resolve()  # RecBole makes it again, from wherever it is
    model = contenders.build(recipe, config, data.train._dataset).to(config["device"])
    config["checkpoint_dir"] = str(place)
    with library.working_directory(str(place)):  # RecBole's trainer logs into the current folder
        trainer = CompressedTrainer(config, model)
    trainer.tensorboard.close()
    written = ("add_scalar", "add_hparams")  # into event files, which nobody would read
    trainer.tensorboard = SimpleNamespace(**dict.fromkeys(written, lambda *args, **kwargs: None))
    seconds: list[float] = []
    scores: list[float] = []
    trainer.measured = {"epoch_seconds": seconds, "valid_scores": scores}
    trainer.saved_model_file = str(place / BEST)
    terms = terms_of(config, data[1:]) | {"environment": json.dumps(environment(config["device"]))}
    trainer.journal = Journal(place, terms)
    for name in (BEST, LAST):
        remove_leftovers(place / name)
    with suppress(CompressionError):  # damaged, or of something else: it is trained from the start
        state = trainer.journal.read()
        if state is not None and (state["best_valid_result"] is None or (place / BEST).is_file()):
            trainer.resume(state, data.valid)

    def say(epoch: int, score: Any) -> None:
        on_epoch(epoch + 1, float(score))

    trainer.fit(data.train, data.valid, verbose=False, callback_fn=say)
    test = trainer.evaluate(data.test)  # with the best epoch's weights, which it loads
    valid, made = trainer.best_valid_result, contenders.finished(recipe, model)
    is_itself = made is model
    if not is_itself:
        valid, test = evaluate(made, data.valid), evaluate(made, data.test)
    sign = 1 if config["valid_metric_bigger"] else -1
    best = max(range(len(scores)), key=lambda i: (sign * scores[i], i))  # of equal ones the last
    step = min(int(config["eval_step"]), int(config["epochs"]))  # as RecBole does
    return made, {
        "valid": plain(valid),
        "test": plain(test),
        "valid_curve": scores,
        "curve_metric": valid_metric(data.valid),
        "eval_step": step,
        "best_epoch": (best + 1) * step,
        "epochs": len(seconds),
        "epoch_seconds": seconds,
        "checkpoint_bytes": os.path.getsize(trainer.saved_model_file) if is_itself else None,
    }


def _derived(
    trial: Trial, parent: Record, path: Path, config: Config, data: Data
) -> tuple[nn.Module, Record]:
    """A model out of a trained uncompressed one, whose weights are in a file."""
    original: Any = contenders.build(UNCOMPRESSED_RECIPE, config, data.train._dataset)
    try:
        load_model(original, str(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise CompressionError(
            f"Expected {path} to hold the weights of the uncompressed model, but got: {error}. "
            "It was removed; --retry trains that model again."
        ) from error
    original = original.to(config["device"]).eval()
    start, memory = perf_counter(), compression_of(config).loss_memory
    given = data.train, data.valid, parent["best_epoch"], trial.seed, trial.rate, memory
    model, recovery = contenders.derive(trial.recipe, original, *given)
    seconds = perf_counter() - start
    curve = [] if recovery is None else [epoch[recovery.metric] for epoch in recovery.epochs]
    return model, {
        "valid": evaluate(model, data.valid),
        "test": evaluate(model, data.test),
        "valid_curve": curve,
        "curve_metric": valid_metric(data.valid),
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
        "parameters": asdict(part_sizes(model)),
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
    users, targets, places, coverage = rank_targets(model, data.test)
    return found | {
        "sharing": shared_layers(model),
        # layers are quantized in a folder, and nowhere else
        "weight_bytes": None if model.table.quantized else _pickled_bytes(model),
        "popularity": by_popularity(targets, places, item_counts(data.train._dataset)),
        "coverage": coverage,
        "users": pack_users(by_user(users, places)),
    }


@torch.no_grad()
def score_times(models: Sequence[nn.Module], users: Any) -> list[float]:
    """Median milliseconds to score the catalogue for one user out of evaluation data, `[models]`,
    which take turns: a machine that slows down slows all of them."""
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
    kept, alike = model.state_dict(), {"memory_format": torch.contiguous_format}
    unique = [*model.named_parameters(), *model.named_buffers()]
    save_file({n: t.detach().cpu().clone(**alike) for n, t in unique if n in kept}, path)


def _pickled_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()
