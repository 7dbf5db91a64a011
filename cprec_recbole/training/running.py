"""`run`: a training with RecBole, from its options to its metrics, on one process or several."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole.config import Config
from recbole.utils import (
    get_trainer,
    init_logger,
    init_seed,
    set_color,
)

from cprec_recbole.config import CompressionError
from cprec_recbole.evaluation import check_cutoffs
from cprec_recbole.files import held, make_folder, remove_leftovers, write_whole
from cprec_recbole.host.library import (
    fitting_options,
    read_options,
    recbole_dataset,
    recbole_loaders,
    recbole_model,
)
from cprec_recbole.parallel import group
from cprec_recbole.parallel.group import Place
from cprec_recbole.parallel.processes import launch
from cprec_recbole.training.job import Job, check, checkpoint_steps, config_of, is_ours
from cprec_recbole.training.journal import BEST, LAST, RESULT, Journal, digest, terms_of
from cprec_recbole.training.trainer import CompressedTrainer


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
        options |= read_options(file, "config_file_list")
    job = Job(
        model,
        dataset,
        {**options, **(config_dict or {})},
        saved,
        None if out is None else os.fspath(out),
        resume,
    )
    return train(job, nproc)


def train(job: Job, nproc: int | None = None) -> dict[str, Any]:
    """Carry out a job, here or on several processes; see `run`."""
    place = Place.from_environment()
    check(job, nproc, place)
    if place is not None:
        group.expect(place)
        result = work(job)
        group.leave()
        return result
    if nproc in (None, 1):
        return work(job)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    config_of(job)  # a bad option is known before anything is started
    if visible is None:  # RecBole's Config sets it
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return launch(int(nproc or 1), work, job)


def work(job: Job) -> dict[str, Any]:
    """One process's part of a job, or all of it."""
    config = config_of(job)
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
    """RecBole's steps in RecBole's order, up to the trainer; then the rest."""
    init_seed(config["seed"], config["reproducibility"])
    _set_up_logging(config, job)
    loaders = _loaders(config)
    init_seed(config["seed"], config["reproducibility"])
    model = recbole_model(config, loaders[0]._dataset).to(config["device"])
    if not group.is_first():  # the same weights everywhere; what is drawn while training differs
        init_seed(config["seed"] + group.rank(), config["reproducibility"])
    logging.getLogger().info(model)
    with fitting_options(config["model"]):
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        if job.out is None:
            return _fit(trainer, config, loaders, job)
        return _into_folder(trainer, config, loaders, job, Path(job.out))


def _into_folder(
    trainer: Any, config: Config, loaders: Any, job: Job, folder: Path
) -> dict[str, Any]:
    """Train with everything in a folder, from where the run there stopped."""
    trainer.saved_model_file = str(folder / BEST)
    unfinished = True
    if isinstance(trainer, CompressedTrainer) and job.saved:
        trainer.journal = Journal(folder, terms_of(config, loaders), checkpoint_steps(config))
        state = _state_of(trainer.journal, job) if job.resume else None
        if state is not None and (folder / RESULT).is_file():
            _say(job, f"The run in {folder} is finished; this is its result.")
            return _read_result(folder / RESULT)
        if state is not None:
            unfinished = trainer.resume(state, *loaders[:2])
            del state  # as large as the model and its optimizer
    result = _fit(trainer, config, loaders, job, unfinished)
    if group.is_first():
        score = result["best_valid_score"]  # infinite where nothing was validated: no JSON
        found = {**result, "best_valid_score": score if math.isfinite(score) else None}
        text = json.dumps(found, indent=1)
        write_whole(folder / RESULT, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return result


def _fit(
    trainer: Any, config: Any, loaders: Any, job: Job, unfinished: bool = True
) -> dict[str, Any]:
    """Train from where it is, test, and put RecBole's result together."""
    train_data, valid_data, test_data = loaders
    show = config["show_progress"]
    if unfinished:
        trainer.fit(
            train_data,
            valid_data,
            saved=job.saved,
            show_progress=show,
            callback_fn=_callback(trainer, job),
        )
    else:
        trainer.eval_collector.data_collect(train_data)  # as `fit` begins
        trainer.put_back_random_state()  # RecBole draws negatives for sampled evaluation
    test_result = trainer.evaluate(test_data, load_best_model=job.saved, show_progress=show)
    logger = logging.getLogger()
    logger.info(set_color("best valid ", "yellow") + f": {trainer.best_valid_result}")
    logger.info(set_color("test result", "yellow") + f": {test_result}")
    return {
        "best_valid_score": float(trainer.best_valid_score),
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": _plain(trainer.best_valid_result),
        "test_result": _plain(test_result),
    }


def _plain(result: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Metrics as Python's numbers: some of RecBole's are NumPy's, which JSON does not know."""
    return None if result is None else {name: float(value) for name, value in result.items()}


def _callback(trainer: Any, job: Job) -> Callable[[int, float], None] | None:
    """What RecBole's `fit` calls after a validation."""
    on_epoch = job.on_epoch
    if on_epoch is None or not group.is_first():
        return None
    return lambda epoch, score: on_epoch(epoch, float(trainer.train_loss_dict[epoch]), score)


def _set_up_logging(config: Config, job: Job) -> None:
    if not group.is_first():
        logging.getLogger().setLevel(logging.ERROR)
    elif job.logs:
        init_logger(config)
        logging.getLogger().info(config)


def _loaders(config: Config) -> tuple[Any, Any, Any]:
    """RecBole's loaders, which every process makes for itself.

    Raises:
        CompressionError: the processes do not read the same, or would have to download it.
    """
    if group.size() > 1 and not os.path.isdir(config["data_path"]):
        raise CompressionError(
            f"Expected `dataset` to be in {config['data_path']} before several processes read it, "
            "but there is no such folder; let one process download it first (`nproc` 1)."
        )
    writes = config["save_dataset"] or config["save_dataloaders"]  # False but on the first
    one_first = any(group.gather(bool(writes)))  # what it writes is read by the others
    if one_first and not group.is_first():
        group.wait()
    dataset = recbole_dataset(config)
    logging.getLogger().info(dataset)
    loaders = recbole_loaders(config, dataset)
    if is_ours(config.model):
        check_cutoffs(config, dataset)
    if one_first and group.is_first():
        group.wait()
    if group.size() > 1:
        found = group.gather(digest(loaders))
        for number, rows in enumerate(found):
            if rows != found[0]:
                raise CompressionError(
                    "Expected `dataset` to hold the same interactions for every process, but "
                    f"those of process {number} are not those of process 0."
                )
    return loaders


def _state_of(journal: Journal, job: Job) -> dict[str, Any] | None:
    """What to go on with; None to start afresh."""
    state = journal.read()
    best = journal.path.with_name(BEST)
    for path in (best, journal.path.with_name(RESULT)) if state is None else ():
        if path.is_file():
            raise CompressionError(
                f"Expected {LAST} beside {path}, but it is missing; start afresh in another folder."
            )
    if state is None:
        _say(job, f"There is nothing to resume in {job.out} yet: starting afresh.")
        return None
    if state["best_valid_result"] is not None and not best.is_file():
        raise CompressionError(
            f"Expected {best} beside {LAST}, but it is missing; start afresh in another folder."
        )
    done = f", after {state['step']} of its steps" if state["step"] else ""
    if not state["ended"]:
        _say(job, f"Resuming in epoch {state['epoch'] + 1}{done}.")
    return state


def _say(job: Job, line: str) -> None:
    if group.is_first():
        (job.say or logging.getLogger().info)(line)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in ("best_valid_result", "test_result"):
            if found[name] is not None:
                found[name] = {metric: float(value) for metric, value in found[name].items()}
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CompressionError(
            f"Expected {path} to hold the result of a run, but it is damaged: {error}. Remove it "
            "to test the model again."
        ) from error
