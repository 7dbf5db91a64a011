"""Train and measure contenders under the same data, objective and seeds."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import get_model, init_seed

from cprec_recbole.compare.results import Comparison, Run, environment
from cprec_recbole.config import CompressionConfig, CompressionError, reject_unknown
from cprec_recbole.host import known_options, recbole_config, whole_number, working_directory
from cprec_recbole.models import CompressedRecommender, compression_of
from cprec_recbole.report import part_sizes, shared_layers
from cprec_recbole.trainer import CompressedTrainer

SETTINGS = Path(__file__).with_name("settings.yaml")
SCORE_REPEATS = 50


@dataclass(frozen=True)
class Contender:
    """One column of the comparison.

    Attributes:
        name: what the tables call it.
        model: RecBole's name of the model that is trained.
        options: RecBole options that only this contender has.
    """

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


def contenders(
    model: str, compression: CompressionConfig, *, with_stock: bool = False
) -> list[Contender]:
    """The uncompressed model, the compressed one, and RecBole's own where asked.

    Args:
        model: RecBole's name of a supported model.
        compression: the options of the compressed one; its objective is trained by both.
        with_stock: also RecBole's own model, dataset and objective.
    """
    uncompressed = CompressionConfig.uncompressed(compression.training)
    columns = [
        Contender("uncompressed", f"Cp{model}", uncompressed.as_dict()),
        Contender("compressed", f"Cp{model}", compression.as_dict()),
    ]
    if with_stock:
        columns.append(Contender("RecBole's own", model))
    return columns


class Experiment:
    """Contenders, trained and measured one after the other for each seed.

    Args:
        columns: the contenders; the first is what the others are measured against. Their own
            options win over everything.
        dataset: RecBole's name of the data set.
        seeds: how many seeds; they count up from RecBole's `seed`.
        options: RecBole options for all contenders; they win over the files.
        config_files: RecBole YAML files; they win over `settings.yaml` beside this module.

    Raises:
        CompressionError: an option that RecBole does not know or refuses, or that leaves nothing to
            measure.
    """

    def __init__(
        self,
        columns: list[Contender],
        dataset: str,
        seeds: int = 1,
        options: dict[str, Any] | None = None,
        config_files: list[str] | None = None,
    ) -> None:
        if seeds < 1:
            raise CompressionError(f"Expected `seeds` to be 1 or more, but got {seeds}.")
        self.columns = columns
        self.dataset = dataset
        self.options = options or {}
        self.config_files = config_files or []
        configs = [self._config(column, None) for column in columns]  # each is checked by this
        reject_unknown(self.options, known_options(configs[0]))
        for config in configs:
            _check_measurable(config)
        self.seeds = [whole_number(configs[0], "seed", lowest=0) + i for i in range(seeds)]
        self.epochs = whole_number(configs[0], "epochs")

    def run(
        self,
        command: str,
        on_epoch: Callable[[str, int, int, float], None],
        on_run: Callable[[str, int], None] = lambda contender, seed: None,
    ) -> Comparison:
        """Train every contender with every seed.

        Args:
            command: what to write down as the way to repeat this.
            on_epoch: called after each epoch with contender, seed, epoch and validation score.
            on_run: called before each training with contender and seed.

        Raises:
            CompressionError: blocks that do not fit the catalogue; before any training.
        """
        self._check_plans()
        runs: list[Run] = []
        description: dict[str, Any] = {}
        for seed in self.seeds:
            trained: list[tuple[Run, torch.nn.Module, Interaction]] = []
            for column in self.columns:
                on_run(column.name, seed)
                config = self._config(column, seed)
                run, model, users, description = self._train(column, config, on_epoch)
                trained.append((run, model, users))
            _time_scoring(trained)
            runs += [run for run, _, _ in trained]
        return Comparison(
            command=command,
            dataset=description,
            seeds=self.seeds,
            settings={**self.options, "config_files": self.config_files},
            contenders={c.name: {"model": c.model, **c.options} for c in self.columns},
            configuration={c.name: _shown(self._config(c, None)) for c in self.columns},
            environment=environment(),
            runs=runs,
        )

    def _check_plans(self) -> None:
        """Whether every contender's blocks fit the catalogue."""
        for column in self.columns:
            config = self._config(column, None)
            if column is self.columns[0]:
                n_items = int(create_dataset(config).item_num)
            record = getattr(config.model_class, "record", None)
            if record is not None:
                dim = record.dim(whole_number(config, record.size_option))
                compression_of(config).plan(dim, n_items)

    def _config(self, column: Contender, seed: int | None) -> Config:
        options = {**self.options, **column.options}
        if seed is not None:
            options["seed"] = seed
        files = [str(SETTINGS), *self.config_files]
        return recbole_config(column.model, self.dataset, options, files)

    def _train(
        self, column: Contender, config: Config, on_epoch: Callable[[str, int, int, float], None]
    ) -> tuple[Run, torch.nn.Module, Interaction, dict[str, Any]]:
        seed = int(config["seed"])
        init_seed(seed, config["reproducibility"])
        dataset = create_dataset(config)
        train_data, valid_data, test_data = data_preparation(config, dataset)
        init_seed(seed, config["reproducibility"])
        model = get_model(config["model"])(config, train_data._dataset).to(config["device"])
        with tempfile.TemporaryDirectory() as folder:
            config["checkpoint_dir"] = folder
            with working_directory(folder):  # RecBole's trainer logs into the current folder
                trainer = _MeasuredTrainer(config, model)
            trainer.fit(
                train_data,
                valid_data,
                verbose=False,
                callback_fn=lambda epoch, score: on_epoch(column.name, seed, epoch, float(score)),
            )
            test = trainer.evaluate(test_data)
            checkpoint_bytes = os.path.getsize(trainer.saved_model_file)
        run = Run(
            contender=column.name,
            seed=seed,
            valid=_plain(trainer.best_valid_result),
            test=_plain(test),
            valid_curve=trainer.valid_scores,
            best_epoch=trainer.best_epoch(),
            epoch_seconds=trainer.epoch_seconds,
            parameters=part_sizes(model).as_dict(),
            sharing=shared_layers(model) if isinstance(model, CompressedRecommender) else "none",
            weight_bytes=_saved_bytes(model.state_dict()),
            checkpoint_bytes=checkpoint_bytes,
        )
        users = next(iter(test_data))[0]
        described = {
            "name": self.dataset,
            "users": int(dataset.user_num) - 1,
            "items": int(dataset.item_num) - 1,
            "test_cases": len(test_data._dataset),
            "evaluation": config["eval_args"],
        }
        return run, model, users, described


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

    def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        loss = super()._train_epoch(*args, **kwargs)
        self.epoch_seconds.append(perf_counter() - start)
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
def _time_scoring(trained: list[tuple[Run, torch.nn.Module, Interaction]]) -> None:
    """Median milliseconds to score the catalogue for one user; contenders take turns, so that a
    machine that slows down slows all of them."""
    times: dict[int, list[float]] = {index: [] for index in range(len(trained))}
    for repeat in range(SCORE_REPEATS + 5):
        for index, (_, model, users) in enumerate(trained):
            model.eval()
            device = next(model.parameters()).device
            row = repeat % len(users)
            user = users[slice(row, row + 1)].to(device)
            start = perf_counter()
            model.full_sort_predict(user)  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 5:  # the first calls warm caches up
                times[index].append(1e3 * (perf_counter() - start))
    for index, (run, _, _) in enumerate(trained):
        run.score_ms = median(times[index])


def _saved_bytes(state: dict[str, Any]) -> int:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def _plain(result: Any) -> dict[str, float]:
    return {name: float(value) for name, value in (result or {}).items()}


def _shown(config: Config) -> dict[str, Any]:
    """All options that RecBole used, but the folders of this machine."""
    folders = ("data_path", "checkpoint_dir")
    return {k: v for k, v in sorted(config.final_config_dict.items()) if k not in folders}


def _check_measurable(config: Config) -> None:
    """Raise a CompressionError where no epoch would be trained or none evaluated."""
    for name in ("epochs", "eval_step"):
        whole_number(config, name)
    measured = [f"{metric}@{k}" for metric in config["metrics"] for k in config["topk"]]
    if config["valid_metric"].lower() not in [name.lower() for name in measured]:
        raise CompressionError(
            f"Expected `valid_metric` to be one of {', '.join(measured)} (by `metrics`, `topk`), "
            f"but got {config['valid_metric']}."
        )
