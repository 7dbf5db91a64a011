"""Train and measure contenders under the same data, objective and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

from cprec_recbole.compare.controls import Control, DerivedControl, Setting, Trained, TrainedControl
from cprec_recbole.compare.fitting import Data, fit, pickled_bytes, score_times
from cprec_recbole.compare.results import (
    COMPRESSED,
    UNCOMPRESSED,
    Comparison,
    Run,
    environment,
    in_a_line,
)
from cprec_recbole.compare.sizes import served_bytes
from cprec_recbole.config import CompressionConfig, CompressionError, check_whole, reject_unknown
from cprec_recbole.costs import part_sizes, shared_layers
from cprec_recbole.host.library import (
    known_options,
    recbole_config,
    recbole_dataset,
)
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import check_valid_metric, evaluate

SETTINGS = Path(__file__).with_name("settings.yaml")


@dataclass(frozen=True)
class Contender:
    """One column of the comparison.

    Attributes:
        name: what the tables call it.
        model: RecBole's name of the model that is trained.
        options: RecBole options that only this contender has; a control's follow from the data.
        control: what it is made by, where it is a control.
    """

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    control: Control | None = None


def contenders(
    model: str,
    compression: CompressionConfig,
    *,
    with_stock: bool = False,
    controls: Sequence[Control] = (),
) -> list[Contender]:
    """The uncompressed model, the compressed one, and controls and RecBole's own where asked.

    Args:
        model: RecBole's name of a supported model.
        compression: the options of the compressed one; its objective is trained by both.
        with_stock: also RecBole's own model, dataset and objective.
        controls: contenders that are measured by the compressed one.
    """
    same = compression.training, compression.loss_memory
    uncompressed = CompressionConfig.uncompressed(*same)
    columns = [
        Contender(UNCOMPRESSED, f"Cp{model}", uncompressed.as_dict()),
        Contender(COMPRESSED, f"Cp{model}", compression.as_dict()),
    ]
    columns += [Contender(control.name, f"Cp{model}", control=control) for control in controls]
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
            check_measurable(config)
        self.seeds = [check_whole("seed", configs[0]["seed"], 0) + i for i in range(seeds)]
        self.epochs = check_whole("epochs", configs[0]["epochs"])

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

        A contender that fails, with any seed, is left out of the results and stops no other.

        Raises:
            CompressionError: blocks that do not fit the catalogue, before any training; or the
                first contender fails, which the others are measured against.
        """
        columns = self._planned()
        runs: list[Run] = []
        failed: dict[str, str] = {}
        description: dict[str, Any] = {}
        for seed in self.seeds:
            trained: list[tuple[Run, torch.nn.Module, Interaction]] = []
            for column in columns:
                if column.name in failed:
                    continue
                on_run(column.name, seed)
                config = self._config(column, seed)
                control = column.control
                try:
                    if isinstance(control, DerivedControl):
                        first, original, _ = trained[0]
                        run, model, users = self._derive(column, control, config, first, original)
                    else:
                        run, model, users, description = self._train(column, config, on_epoch)
                except Exception as error:
                    if column is columns[0]:
                        raise CompressionError(
                            f"{column.name}, which all others are measured against, failed with "
                            f"seed {seed}: {in_a_line(error)}"
                        ) from error
                    failed[column.name] = f"seed {seed}: {in_a_line(error)}"
                    continue
                trained.append((run, model, users))
            times = score_times([m for _, m, _ in trained], [users for _, _, users in trained])
            for (run, _, _), milliseconds in zip(trained, times):
                run.score_ms = milliseconds
            runs += [run for run, _, _ in trained]
        shown = [column for column in columns if column.name not in failed]
        return Comparison(
            command=command,
            dataset=description,
            seeds=self.seeds,
            settings={**self.options, "config_files": self.config_files},
            contenders={c.name: {"model": c.model, **c.options} for c in shown},
            configuration={c.name: _shown(self._config(c, None)) for c in shown},
            environment=environment(),
            runs=[run for run in runs if run.contender not in failed],
            failed=failed,
        )

    def _planned(self) -> list[Contender]:
        """The contenders with the options of the controls, all checked; controls that are no other
        model than the compressed one are left out."""
        planned: list[Contender] = []
        setting: Setting | None = None
        for column in self.columns:
            if column.control is not None:
                if setting is None or planned[0].name != UNCOMPRESSED:
                    raise CompressionError(
                        f"Expected `{UNCOMPRESSED}` first and `{COMPRESSED}` before the control "
                        f"{column.name}, which is measured by them; use contenders(...)."
                    )
                if not column.control.differs(setting):
                    continue
                column = replace(column, options=column.control.options(setting))
            config = self._config(column, None)
            if column is self.columns[0]:
                dataset = recbole_dataset(config)
            spec = getattr(config.model_class, "spec", None)
            if spec is not None:
                options, n_items = compression_of(config), int(dataset.item_num)
                options.plan(
                    spec.dim(check_whole(spec.size_option, config[spec.size_option])), n_items
                )
                if column.name == COMPRESSED:
                    setting = Setting(config, dataset, options)
            planned.append(column)
        return planned

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
        data = Data.of(config)
        init_seed(seed, config["reproducibility"])
        control = column.control if isinstance(column.control, TrainedControl) else None
        fitted = fit(config, data, lambda *epoch: on_epoch(column.name, seed, *epoch), control)
        run = Run(
            contender=column.name,
            seed=seed,
            valid=fitted.valid,
            test=fitted.test,
            valid_curve=fitted.valid_curve,
            best_epoch=fitted.best_epoch,
            epoch_seconds=fitted.epoch_seconds,
            checkpoint_bytes=fitted.checkpoint_bytes,
            **_described(fitted.model),
        )
        users = next(iter(data.test))[0]
        described = {
            "name": self.dataset,
            "users": int(data.dataset.user_num) - 1,
            "items": int(data.dataset.item_num) - 1,
            "test_cases": len(data.test._dataset),
            "evaluation": config["eval_args"],
        }
        return run, fitted.model, users, described

    def _derive(
        self,
        column: Contender,
        control: DerivedControl,
        config: Config,
        first: Run,
        original: torch.nn.Module,
    ) -> tuple[Run, torch.nn.Module, Interaction]:
        """A contender out of the uncompressed model, which was trained with the same seed."""
        data = Data.of(config)
        seed = int(config["seed"])
        whole = cast(CompressedRecommender, original)  # the first column is a Cp model
        trained = Trained(whole, data.train, data.valid, first.best_epoch, seed)
        model, recovery = control.derive(trained, column.options)
        curve = [] if recovery is None else [found[recovery.metric] for found in recovery.epochs]
        run = Run(
            contender=column.name,
            seed=seed,
            valid=evaluate(model, data.valid),
            test=evaluate(model, data.test),
            valid_curve=curve,
            best_epoch=0 if recovery is None else recovery.kept,
            epoch_seconds=[],
            checkpoint_bytes=0,
            **_described(model),
        )
        return run, model, next(iter(data.test))[0]


def _described(model: torch.nn.Module) -> dict[str, Any]:
    """What a model is, for its Run."""
    # layers are in int8 in a folder, and nowhere else
    in_folder = isinstance(model, CompressedRecommender) and model.table.is_int8
    return {
        "parameters": part_sizes(model).as_dict(),
        "served_bytes": served_bytes(model),
        "sharing": shared_layers(model) if isinstance(model, CompressedRecommender) else "none",
        "weight_bytes": 0 if in_folder else pickled_bytes(model.state_dict()),
    }


def _shown(config: Config) -> dict[str, Any]:
    """All options that RecBole used, but the folders of this machine."""
    folders = ("data_path", "checkpoint_dir")
    return {k: v for k, v in sorted(config.final_config_dict.items()) if k not in folders}


def check_measurable(config: Config) -> None:
    """Raise a CompressionError where no epoch would be trained or none evaluated."""
    for name in ("epochs", "eval_step"):
        check_whole(name, config[name])
    check_valid_metric(config)
