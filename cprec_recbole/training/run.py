"""`run`: a training with RecBole, from its options to its metrics, on one process or several."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils import EvaluatorType, get_model, get_trainer, init_logger, init_seed, set_color

from cprec_recbole.config import (
    CompressionConfig,
    CompressionError,
    check_whole,
    is_near,
    reject_unknown,
)
from cprec_recbole.files import held, make_folder, remove_leftovers, write_text
from cprec_recbole.host import library
from cprec_recbole.models import MODELS
from cprec_recbole.parallel import group
from cprec_recbole.parallel.launch import launch
from cprec_recbole.threads import threads_for
from cprec_recbole.training.evaluation import check_topk, check_valid_metric, plain
from cprec_recbole.training.state import BEST, LAST, RESULT, Journal, digest, terms_of
from cprec_recbole.training.trainer import CompressedTrainer

# options of ours beside those of a CompressionConfig; the last one is an error that says why
_OWN = ("checkpoint_steps", "shard_tails")
_UNNAMED = ("encoding", "tail_ratio")  # options that RecBole reads and names nowhere


@dataclass(frozen=True)
class Job:
    """What a run is asked for; goes to every process."""

    model: str  # RecBole's name of it
    dataset: str
    options: dict[str, Any] = field(default_factory=dict)  # RecBole's
    saved: bool = True  # whether the best weights are written
    out: str | None = None  # where everything is written; None for RecBole's `checkpoint_dir`
    resume: bool = False
    # takes a line about each epoch, in the first process; None: RecBole's own log is shown
    say: Callable[[str], None] | None = None
    # the options that RecBole or we have to know; a file may hold those of other models
    named: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether the model is a compressed one."""
        return self.model in {model.__name__ for model in MODELS}


def run(
    model: str,
    dataset: str,
    *,
    nproc: int | None = None,
    config_file_list: Sequence[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    saved: bool = True,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train and test a model with RecBole, one of ours or one of RecBole's own.

    What `run_recbole` does and returns, but for `sys.argv`, which is not read; and on several
    processes. A script that calls it with `nproc` needs `if __name__ == "__main__":` around it.
    Under torchrun, every process calls it, without `nproc`.

    Args:
        model: RecBole's name of the model.
        dataset: RecBole's name of the data set.
        nproc: processes to start on this machine; 1 works in this one.
        config_file_list: RecBole's YAML files.
        config_dict: RecBole's options; they win over the files. `checkpoint_steps: N` also writes
            `last.pth` after every N-th step of an epoch.
        saved: whether to keep the best weights, with which the test is made.
        out: a folder for `best.pth`, RecBole's checkpoint; `last.pth`, from which an interrupted
            run goes on (our models only); and `result.json`. None: RecBole's `checkpoint_dir`.
        resume: go on with the run in `out`; it ends where it would have ended.

    Returns:
        `best_valid_score`, `valid_score_bigger`, `best_valid_result` and `test_result`.

    Raises:
        CompressionError: an option that does not fit, or a process that was killed.
    """
    if isinstance(config_file_list, str):
        raise CompressionError(
            f"Expected `config_file_list` to be a list of files, but got {config_file_list!r}."
        )
    options: dict[str, Any] = {}
    for file in config_file_list or ():
        options |= library.read_options(file, "config_file_list")
    options |= config_dict or {}
    folder = None if out is None else os.fspath(out)
    return train(Job(model, dataset, options, saved, folder, resume), nproc)


def train(job: Job, nproc: int | None = None) -> dict[str, Any]:
    """Carry out a job, here or on several processes; see `run`."""
    n_processes = 1 if nproc is None else check_whole("nproc", nproc)
    place = group.place_of_torchrun()
    if place is not None and nproc not in (None, place.size):
        raise CompressionError(
            f"Expected no `nproc` under torchrun, which has started {place.size} processes, but "
            f"got {nproc}."
        )
    group.place = place
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    config = _checked_config(job)
    if place is None and n_processes > 1:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # RecBole's Config has set it
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        return launch(n_processes, train_here, job)
    result = train_here(job, config)
    group.leave()
    return result


def _checked_config(job: Job) -> Config:
    """RecBole's config of a job; a CompressionError for whatever is known to be wrong."""
    ours = ", ".join(model.__name__ for model in MODELS)
    try:
        get_model(job.model)
    except (ValueError, AttributeError, TypeError, ImportError):
        raise CompressionError(
            f"Expected `model` to be one of {ours}, or the name of one of RecBole's own models, "
            f"spelt as there, but got {job.model!r}."
        ) from None
    if job.out == "":
        raise CompressionError("Expected `out` to be a folder, but got ''.")
    for name in (LAST, RESULT, BEST):
        if job.out is not None and not job.resume and (Path(job.out) / name).exists():
            raise CompressionError(
                f"Expected `out` to be a folder without a run, but got {job.out} with {name}; "
                f"{'resume that run, or ' if job.is_ours else ''}choose another folder."
            )
    config = library.recbole_config(job.model, job.dataset, job.options)
    if job.is_ours and config["eval_type"] == EvaluatorType.RANKING and config["eval_step"] > 0:
        check_valid_metric(config)
    for name in (*_OWN, *CompressionConfig.option_names()):
        if not job.is_ours and name != "training" and config[name] is not None:
            raise CompressionError(
                f"Expected `{name}` with one of {ours}, but got it for {job.model}, which is not "
                "compressed."
            )
    known = (*library.known_options(config), *_OWN, *_UNNAMED)
    # RecBole's own models may read what is named nowhere
    reject_unknown([name for name in job.named if job.is_ours or is_near(name, known)], known)
    steps = config["checkpoint_steps"]
    if steps is not None:
        check_whole("checkpoint_steps", steps, 0)
    for name, asked in (("resume", job.resume), ("checkpoint_steps", steps)):
        if asked and not (job.is_ours and job.saved and job.out is not None):
            raise CompressionError(
                f"Expected `{name}` with an `out` folder and one of {ours}, but got it for "
                f"{job.model} with out={job.out}, saved={job.saved}."
            )
    return config


def train_here(job: Job, config: Config | None = None) -> dict[str, Any]:
    """One process's part of a job, or all of it."""
    if config is None:
        config = library.recbole_config(job.model, job.dataset, job.options)  # joins the others
    if job.out is None:
        return _train_and_test(config, job)
    config["checkpoint_dir"] = job.out
    if not group.is_first():
        return _train_and_test(config, job)
    folder = Path(job.out)
    make_folder(folder)
    with held(folder):
        for name in (LAST, BEST, RESULT):
            remove_leftovers(folder / name)
        return _train_and_test(config, job)


def _train_and_test(config: Config, job: Job) -> dict[str, Any]:
    logger = logging.getLogger()
    init_seed(config["seed"], config["reproducibility"])
    if not group.is_first():
        logger.setLevel(logging.ERROR)
    elif job.say is None:
        init_logger(config)
        logger.info(config)
    loaders = _loaders(config, job)
    init_seed(config["seed"], config["reproducibility"])
    model = library.recbole_model(config, loaders[0]._dataset).to(config["device"])
    if not group.is_first():  # the same weights everywhere; what is drawn while training differs
        init_seed(config["seed"] + group.rank(), config["reproducibility"])
    logger.info(model)
    dim = config["embedding_size"] or config["hidden_size"] or 1
    with (
        library.fitting_options(config["model"]),
        threads_for(loaders[0]._dataset.item_num, dim) as n_threads,
    ):
        logger.info(f"Threads: {n_threads}. OMP_NUM_THREADS asks for another number.")
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        if job.out is None:
            return _fit_and_test(trainer, config, loaders, job)
        folder = Path(job.out)
        trainer.saved_model_file = str(folder / BEST)
        if isinstance(trainer, CompressedTrainer) and job.saved:
            steps = config["checkpoint_steps"] or 0
            trainer.journal = Journal(folder, terms_of(config, loaders), steps)
            state = _state_to_resume(trainer.journal, job) if job.resume else None
            if state is not None and (folder / RESULT).is_file():
                _say(job, f"The run in {folder} is finished; this is its result.")
                return _read_result(folder / RESULT)
            if state is not None:
                trainer.resume(state, loaders[1])
                del state  # as large as the model and its optimizer
        result = _fit_and_test(trainer, config, loaders, job)
    if group.is_first():
        score = result["best_valid_score"]  # infinite where nothing was validated: no JSON
        found = {**result, "best_valid_score": score if math.isfinite(score) else None}
        write_text(folder / RESULT, json.dumps(found, indent=1) + "\n")
    return result


def _loaders(config: Config, job: Job) -> tuple[Any, Any, Any]:
    """RecBole's loaders, which every process makes for itself; a CompressionError where they do not
    read the same, or would have to download it."""
    if group.size() > 1 and not os.path.isdir(config["data_path"]):
        raise CompressionError(
            f"Expected `dataset` to be in {config['data_path']} before several processes read it, "
            "but there is no such folder; let one process download it first (`nproc` 1)."
        )
    dataset = library.recbole_dataset(config)
    logging.getLogger().info(dataset)
    loaders = library.recbole_loaders(config, dataset)
    if job.is_ours:
        check_topk(config, dataset)
    rows = group.gather(digest(loaders)) if group.size() > 1 else []
    for number, found in enumerate(rows):
        if found != rows[0]:
            raise CompressionError(
                "Expected `dataset` to hold the same interactions for every process, but those of "
                f"process {number} are not those of process 0."
            )
    return loaders


def _fit_and_test(trainer: Any, config: Any, loaders: Any, job: Job) -> dict[str, Any]:
    train_data, valid_data, test_data = loaders
    show, logger = config["show_progress"], logging.getLogger()

    def tell(epoch: int, score: float) -> None:
        if job.say is not None:  # otherwise it is in RecBole's log
            loss = float(trainer.train_loss_dict[epoch])
            _say(job, f"epoch {epoch + 1}: training loss {loss:.4f}, valid {score:.4f}")

    trainer.fit(train_data, valid_data, saved=job.saved, show_progress=show, callback_fn=tell)
    test_result = trainer.evaluate(test_data, load_best_model=job.saved, show_progress=show)
    logger.info(set_color("best valid ", "yellow") + f": {trainer.best_valid_result}")
    logger.info(set_color("test result", "yellow") + f": {test_result}")
    return {
        "best_valid_score": float(trainer.best_valid_score),
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": plain(trainer.best_valid_result),
        "test_result": plain(test_result),
    }


def _say(job: Job, line: str) -> None:
    if group.is_first():
        (job.say or logging.getLogger().info)(line)


def _state_to_resume(journal: Journal, job: Job) -> dict[str, Any] | None:
    """What to go on with; None to start afresh."""
    state = journal.read()
    last, best, result = (journal.path.with_name(name) for name in (LAST, BEST, RESULT))
    needed = [(last, other) for other in (best, result) if other.is_file()]
    if state is not None and state["best_valid_result"] is not None:
        needed.append((best, last))
    for path, other in needed:
        if not path.is_file():
            raise CompressionError(
                f"Expected {path.name} beside {other}, but it is missing; start afresh in another "
                "folder."
            )
    if state is None:
        _say(job, f"There is nothing to resume in {job.out} yet: starting afresh.")
    elif not state["ended"]:
        done = f", after {state['step']} of its steps" if state["step"] else ""
        _say(job, f"Resuming in epoch {state['epoch'] + 1}{done}.")
    return state


def _read_result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = ("best_valid_result", "test_result")
        return {**found, **{part: plain(found[part]) for part in parts}}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CompressionError(
            f"Expected {path} to hold the result of a run, but it is damaged: {error}. Remove it "
            "to test the model again."
        ) from error
