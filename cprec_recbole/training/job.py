"""What a run is asked for, and everything about it that can be wrong before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils import EvaluatorType, get_model

from cprec_recbole.config import (
    CompressionConfig,
    CompressionError,
    is_near,
    reject_unknown,
)
from cprec_recbole.evaluation import check_valid_metric
from cprec_recbole.host.library import known_options, recbole_config, whole_number
from cprec_recbole.models import MODELS
from cprec_recbole.parallel.group import Place
from cprec_recbole.training.journal import BEST, LAST, RESULT

OnEpoch = Callable[[int, float, float], None]  # epoch from 0, its training loss, its valid score


@dataclass(frozen=True)
class Job:
    """What a run is asked for; goes to every process.

    Attributes:
        model: RecBole's name of the model.
        dataset: RecBole's name of the data set.
        options: RecBole's options.
        saved: whether the best weights are written.
        out: where everything is written; None for RecBole's `checkpoint_dir`.
        resume: whether to go on with what `out` holds.
        on_epoch: called after every validation, by the first process.
        say: takes a line about where the run begins; the first process's.
        logs: whether RecBole's own log is written and shown.
        named: which options RecBole or we have to know; a file may hold those of other models.
    """

    model: str
    dataset: str
    options: dict[str, Any] = field(default_factory=dict)
    saved: bool = True
    out: str | None = None
    resume: bool = False
    on_epoch: OnEpoch | None = None
    say: Callable[[str], None] | None = None
    logs: bool = True
    named: tuple[str, ...] = ()


_OWN = ("shard_tails", "checkpoint_steps")  # options of ours beside those of a CompressionConfig
_READ = ("encoding", "tail_ratio")  # options that RecBole reads and names nowhere


def _ours() -> list[str]:
    return [model.__name__ for model in MODELS]


def is_ours(name: str) -> bool:
    """Whether a model's name is one of a compressed model."""
    return name in _ours()


def config_of(job: Job) -> Config:
    """RecBole's config of a job; in a process that is one of several, joins the others."""
    config = recbole_config(job.model, job.dataset, job.options)
    is_ranked = config["eval_type"] == EvaluatorType.RANKING
    if is_ours(job.model) and is_ranked and config["eval_step"] > 0:
        check_valid_metric(config)
    for name in () if is_ours(job.model) else (*_OWN, *CompressionConfig.option_names()):
        if name != "training" and config[name] is not None:
            raise CompressionError(
                f"Expected `{name}` with one of {', '.join(_ours())}, but got it for {job.model}, "
                "which is not compressed."
            )
    known = (*known_options(config), *_OWN, *_READ)
    for name in job.named:
        # RecBole's own models may read what is named nowhere
        if name not in known and (is_ours(job.model) or is_near(name, known)):
            reject_unknown([name], known)
    if checkpoint_steps(config) and (not is_ours(job.model) or job.out is None or not job.saved):
        raise CompressionError(
            f"Expected `checkpoint_steps` with an `out` folder and one of {', '.join(_ours())}, "
            f"but got it for {job.model} with out={job.out}, saved={job.saved}."
        )
    return config


def checkpoint_steps(config: Config) -> int:
    """The option of that name; 0 where it was not given."""
    if config["checkpoint_steps"] is None:
        return 0
    return whole_number(config, "checkpoint_steps", 0)


def check(job: Job, nproc: int | None, place: Place | None) -> None:
    """Everything that is known to be wrong before anything is started."""
    if nproc is not None and (not isinstance(nproc, int) or isinstance(nproc, bool) or nproc < 1):
        raise CompressionError(
            f"Expected `nproc` to be a whole number, 1 or more, but got {nproc!r}."
        )
    if place is not None and nproc not in (None, place.size):
        raise CompressionError(
            f"Expected no `nproc` under torchrun, which has started {place.size} processes, but "
            f"got {nproc}."
        )
    _check_model(job.model)
    if job.out == "":
        raise CompressionError("Expected `out` to be a folder, but got ''.")
    if job.resume and (job.out is None or not job.saved):
        raise CompressionError(
            "Expected `resume` with the `out` folder of the run to go on with, but got "
            f"out={job.out!r}, saved={job.saved}."
        )
    if job.resume and not is_ours(job.model):
        raise CompressionError(
            f"Expected `resume` with one of {', '.join(_ours())}, whose trainer writes its whole "
            f"state, but got {job.model}."
        )
    if job.out is not None and not job.resume:
        folder = Path(job.out)
        here = [name for name in (LAST, RESULT, BEST) if (folder / name).exists()]
        if here:
            raise CompressionError(
                f"Expected `out` to be a folder without a run, but got {folder} with {here[0]}; "
                f"{'resume that run, or ' if is_ours(job.model) else ''}choose another folder."
            )


def _check_model(name: Any) -> None:
    """Raise a CompressionError for what RecBole finds no model by."""
    try:
        get_model(name)
    except (ValueError, AttributeError, TypeError, ImportError):
        raise CompressionError(
            f"Expected `model` to be one of {', '.join(_ours())}, or the name of one of RecBole's "
            f"own models, spelt as there, but got {name!r}."
        ) from None
