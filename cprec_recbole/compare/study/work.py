"""The pieces of work of a study: what its processes do, one piece after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from recbole.utils import get_model, init_seed
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import nn

from cprec_recbole.compare.controls import (
    CONTROLS,
    DerivedControl,
    Setting,
    Trained,
    TrainedControl,
)
from cprec_recbole.compare.controls.int8 import TrainedInt8
from cprec_recbole.compare.controls.recovered import Recovered, RecoveredInt8
from cprec_recbole.compare.experiment import SETTINGS
from cprec_recbole.compare.fitting import Data, fit, score_times
from cprec_recbole.compare.results import COMPRESSED, UNCOMPRESSED, environment
from cprec_recbole.compare.sizes import served_bytes
from cprec_recbole.compare.study.recipes import (
    MODEL,
    Planning,
    Source,
    Trial,
    Work,
    recipe_without_ratio,
)
from cprec_recbole.compare.study.spec import (
    SHARED_OPTIONS,
    Cell,
    Spec,
    own_options,
    scheme_of,
)
from cprec_recbole.compare.study.store import PLANS, TRIALS, WEIGHTS, Store
from cprec_recbole.compare.users import rank_targets
from cprec_recbole.compression.compress import compress
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.costs import part_sizes
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.files import write_whole
from cprec_recbole.host.library import recbole_config
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import evaluate
from cprec_recbole.training.state import digest

OnEpoch = Callable[[int, float], None]  # epoch from 0, validation score


def do(work: Work, spec: Spec, store: Store, data_path: str | None, on_epoch: OnEpoch) -> None:
    """Do a piece of work and keep what it gives.

    Raises:
        Exception: whatever went wrong; nothing is kept then.
    """
    logging.getLogger("recbole").setLevel(logging.ERROR)
    bench = Bench(spec, store, data_path)
    if isinstance(work, Planning):
        # what is planned stays: the seeds of a contender are one model
        store.write(PLANS, work.key, {**bench.plan(work), **(store.read(PLANS, work.key) or {})})
    else:
        with store.unfinished(work.key) as folder:
            bench.train(work, on_epoch, folder)


class Bench:
    """Where the work of a study is done: under its options, on its data.

    Args:
        spec: the study.
        store: its folder; None where nothing is kept.
        data_path: where data sets are; None for RecBole's own place.
    """

    def __init__(self, spec: Spec, store: Any, data_path: str | None) -> None:
        self.spec, self.store, self.data_path = spec, store, data_path

    def config(self, cell: Cell, options: dict[str, Any], seed: int, rate: float | None) -> Any:
        """RecBole's config of a training."""
        given: dict[str, Any] = {"metric_decimal_place": 6}  # RecBole's 4 make ties of rates
        given |= {**self.spec.options, "MAX_ITEM_LIST_LENGTH": cell.length, "seed": seed}
        if rate is not None:
            given["learning_rate"] = rate
        if self.data_path is not None:
            given["data_path"] = self.data_path
        given |= options
        return recbole_config(f"Cp{cell.model}", cell.dataset, given, [str(SETTINGS)])

    def plan(self, work: Planning) -> dict[str, Any]:
        """The recipe of each contender, or why there is none, or that it is the compressed one."""
        plain = recipe_without_ratio(self.spec, UNCOMPRESSED)
        config = self.config(work.cell, plain.options, self.spec.seeds[0], None)
        data = Data.of(config)
        fresh = get_model(config["model"])(config, data.train._dataset)
        known = compression_of(config)
        found: dict[str, Any] = {}
        chosen: dict[str | None, CompressionConfig | str] = {}
        for name in work.contenders:
            scheme, refused_size = scheme_of(name), None
            if scheme not in chosen:
                chosen[scheme] = _choice(fresh, work.ratio, self.spec.compression, scheme)
            choice = chosen[scheme]
            try:
                if isinstance(choice, str):
                    if name not in CONTROLS or not CONTROLS[name].by_size:
                        raise CompressionError(choice)
                    choice = CompressionConfig(**self.spec.compression)
                    refused_size = int(part_sizes(fresh).total / work.ratio)
                compression = replace(
                    choice, training=known.training, loss_memory=known.loss_memory
                )
                setting = Setting(config, data.dataset, compression, refused_size)
                if isinstance(CONTROLS.get(name), RecoveredInt8):
                    _check_int8(fresh, work.ratio, self.spec.compression)
                found[name] = _recipe(name, setting, work.ratio, self.spec)
            except CompressionError as error:
                found[name] = {"error": str(error)}
        return found

    def train(self, work: Trial, on_epoch: OnEpoch, folder: Path) -> None:
        """Make, train and measure a model, and keep what is found."""
        start = perf_counter()
        options = {k: v for k, v in work.recipe.options.items() if k not in ("ratio", "dtype")}
        config = self.config(work.cell, options, work.seed, work.rate)
        data = Data.of(config)
        self.store.same_rows(str(work.cell), digest((data.train, data.valid, data.test)))
        init_seed(work.seed, config["reproducibility"])
        if work.source is None:
            model, record = self._from_scratch(work, config, data, on_epoch, folder)
        else:
            model, record = self._derived(work, work.source, config, data)
        ranked = rank_targets(model, data.test)
        users = next(iter(data.test))[0]
        counts = item_counts(data.train._dataset)
        found = {
            "dataset": work.cell.dataset,
            "model": work.cell.model,
            "length": work.cell.length,
            "seed": work.seed,
            "options": work.recipe.options,
            "learning_rate": work.rate,
            "parameters": asdict(part_sizes(model)),
            "total_parameters": part_sizes(model).total,
            "blocks": _blocks(model),
            "sharing": model.compression.sharing,
            "bytes": served_bytes(model),
            **record,
            "score_ms": score_times([model], [users])[0],
            "popularity": ranked.by_popularity(counts),
            "environment": environment(config["device"]),
            "seconds": perf_counter() - start,
        }
        if work.recipe == recipe_without_ratio(self.spec, UNCOMPRESSED):
            path = self.store.path(WEIGHTS, work.key, ".safetensors")
            write_whole(path, lambda to: save_weights(model, str(to)))
        self.store.write_users(work.key, ranked.by_user())
        self.store.write(TRIALS, work.key, found)  # last: with it the trial is finished

    def _from_scratch(
        self, work: Trial, config: Any, data: Data, on_epoch: OnEpoch, folder: Path
    ) -> tuple[CompressedRecommender, dict[str, Any]]:
        control = CONTROLS.get(work.recipe.kind)
        if work.recipe.options.get("dtype") is not None:
            control = TrainedInt8()
        trained = control if isinstance(control, TrainedControl) else None
        fitted = fit(config, data, on_epoch, trained, folder)
        return cast(CompressedRecommender, fitted.model), {
            "valid": fitted.valid,
            "test": fitted.test,
            "valid_curve": fitted.valid_curve,
            "curve_metric": str(config["valid_metric"]).lower(),
            "eval_step": min(int(config["eval_step"]), int(config["epochs"])),  # as RecBole does
            "best_epoch": fitted.best_epoch,
            "epochs": len(fitted.epoch_seconds),
            "epoch_seconds": fitted.epoch_seconds,
        }

    def _derived(
        self, work: Trial, source: Source, config: Any, data: Data
    ) -> tuple[CompressedRecommender, dict[str, Any]]:
        recipe = recipe_without_ratio(self.spec, UNCOMPRESSED)
        plain = self.config(work.cell, recipe.options, work.seed, work.rate)
        original = get_model(plain["model"])(plain, data.train._dataset)
        self._load(original, source)
        original = original.to(plain["device"]).eval()
        trained = Trained(original, data.train, data.valid, source.best_epoch, work.seed, work.rate)
        start = perf_counter()
        control = cast(DerivedControl, CONTROLS[work.recipe.kind])  # no other has a source
        memory = compression_of(plain).loss_memory  # is in no recipe: it is the study's
        made = control.derive(trained, {**work.recipe.options, "loss_memory": memory})
        seconds = perf_counter() - start
        recovery = made.recovery
        curve = [] if recovery is None else [e[recovery.metric] for e in recovery.epochs]
        return made.model, {
            "valid": evaluate(made.model, data.valid),
            "test": evaluate(made.model, data.test),
            "valid_curve": curve,
            "curve_metric": str(plain["valid_metric"]).lower(),
            "eval_step": 1,
            "best_epoch": 0 if recovery is None else recovery.kept,
            "epochs": len(curve),
            # evaluation included, as recover() does both
            "epoch_seconds": [seconds / len(curve) for _ in curve],
        }

    def _load(self, original: nn.Module, source: Source) -> None:
        """Give an uncompressed model its weights; a damaged file is removed, so that they can be
        trained again."""
        path = self.store.path(WEIGHTS, source.key, ".safetensors")
        try:
            load_model(original, str(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise CompressionError(
                f"Expected {path} to hold the weights of the uncompressed model, but got: {error}. "
                "It was removed; --retry trains that model again."
            ) from error


def _blocks(model: CompressedRecommender) -> dict[str, Any] | None:
    """Items and rank of each block, as a budget may have chosen them; None for another table."""
    table: nn.Module = model.table
    if not isinstance(table, BlockEmbedding):
        return None
    return {"items": list(table.partition.sizes), "ranks": list(table.ranks)}


def save_weights(model: nn.Module, path: str) -> None:
    """Write what safetensors' `load_model` reads: each parameter once, by a copy of its own, since
    on a GPU those of a recurrent layer are parts of one storage, which `save_model` refuses."""
    kept = model.state_dict()
    unique = [*model.named_parameters(), *model.named_buffers()]
    plain = {n: t.detach().cpu() for n, t in unique if n in kept}
    contiguous = torch.contiguous_format
    save_file({n: t.clone(memory_format=contiguous) for n, t in plain.items()}, path)


def _choice(
    fresh: Any, ratio: float, base: dict[str, Any], scheme: str | None
) -> CompressionConfig | str:
    """The options of the contender `compressed`, or why it cannot be that small."""
    options = base if scheme is None else {**base, "sharing": scheme}
    try:
        small = compress(fresh, ratio=ratio, verbose=False, **options)
    except CompressionError as error:
        return str(error)
    return small.compression


def _check_int8(fresh: Any, ratio: float, base: dict[str, Any]) -> None:
    """Raise a CompressionError where not even int8 is that small, before anything is trained."""
    compress(fresh, ratio=ratio, dtype="int8", verbose=False, **base)


def _recipe(name: str, setting: Setting, ratio: float, spec: Spec) -> dict[str, Any]:
    """A contender's recipe for a ratio, as JSON."""
    control = CONTROLS.get(name)
    if isinstance(control, Recovered):  # its blocks by the spectra of the table once it is trained
        return {"kind": name, "options": {"ratio": ratio, **spec.compression}}
    if control is None:
        return {"kind": MODEL, "options": own_options(setting.compression)}
    if not control.differs(setting) and COMPRESSED in spec.contenders:
        return {"same": COMPRESSED}
    plain = isinstance(control, TrainedControl) and control.is_plain
    found = control.options(setting)
    options = {k: v for k, v in found.items() if k not in SHARED_OPTIONS}
    return {"kind": MODEL if plain else name, "options": options}
