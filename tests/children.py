"""What the tests have other processes do; a function here goes to them by its name."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from io import BytesIO
from itertools import count
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # which the first optimizer imports: better before a process is forked
import torch.distributed as dist
from recbole.utils import get_model, get_trainer, init_seed

from cprec_recbole import CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.parallel import group
from cprec_recbole.parallel import launch as processes
from cprec_recbole.training.run import Job, train_here
from cprec_recbole.training.state import Journal
from cprec_recbole.training.trainer import CompressedTrainer
from tests.builders import World


def several(*tasks: tuple) -> list[Any]:
    """What each function returns for its arguments."""
    return [task(*arguments) for task, *arguments in tasks]


def joined() -> int:
    """Join the group without RecBole; returns the rank."""
    assert group.place is not None
    group.join(group.place, gpus=False)
    return group.rank()


def places() -> list[tuple[int, int, float]]:
    rank = joined()
    total = float(group.total(torch.tensor(rank + 1.0)))
    return group.gather((rank, group.size(), total))


def end_one(how: str) -> None:
    """The second process ends in some way, while the others wait for it."""
    if joined() == 1:
        if how == "error":
            raise CompressionError("Expected `x` to be 1.")
        if how == "defect":
            raise KeyError("no such thing")
        if how == "kill":
            kill()
        if how == "exit":
            sys.exit(3)
    dist.all_reduce(torch.zeros(1))


def start_two(pipe: Any) -> None:
    """Start two processes that wait for ever."""
    processes.START_METHOD = "fork"  # of a process that is fresh
    processes.launch(2, wait_for_ever, pipe)


def wait_for_ever(pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where a shell has started it with `&`
    pipe.send(joined())
    threading.Event().wait()


def curves(world: World, *cases: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Train models, of which small blocks may have sparse gradients too; what came of each."""
    with mock.patch.object(BlockEmbedding.look_up_sparsely, "__defaults__", (1,)):
        return [curve(world, name, options) for name, options in cases]


def curve(world: World, name: str, options: dict[str, Any]) -> dict[str, Any]:
    config = world.config(name, **options)
    init_seed(config["seed"], True)
    train, valid, test = world.loaders(config)
    init_seed(config["seed"], True)
    # rounding alone would tell two processes from one in float32: Adam makes steps of it
    model = get_model(name)(config, train._dataset).double()
    init_seed(config["seed"] + config["local_rank"], True)
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
    trainer.fit(train, valid, saved=False, verbose=False)
    return {
        "losses": list(trainer.train_loss_dict.values()),
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
        "valid": dict(trainer.best_valid_result),
        "test": dict(trainer.evaluate(test, load_best_model=False)),
        "is sparse": [p.grad.is_sparse for p in model.parameters() if p.grad is not None],
    }


def metrics(world: World, *cases: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The test metrics of models that are the same in every process, without any training."""
    found = []
    for name, options in cases:
        config = world.config(name, **options)
        init_seed(config["seed"], True)
        train, _, test = world.loaders(config)
        init_seed(3, True)
        model = get_model(name)(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
        trainer.eval_collector.data_collect(train)
        found.append(dict(trainer.evaluate(test, load_best_model=False)))
    return found


def carry_out_and_die(job: Job, rank: int, death: str) -> None:
    """A job of which one process is killed at some moment."""
    if group.place.rank == rank:
        die_at(death, kill, setattr)
    train_here(job)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(death: str, end: Callable[[], None], set_attribute: Callable[..., None]) -> None:
    """Have this process end at `NAME N`, before the N-th call of a function; for `save`, when half
    of the N-th file is written."""
    name, call = death.split()
    owners = (CompressedTrainer, Journal, os, torch)
    owner = next(owner for owner in owners if hasattr(owner, name))
    function, calls = getattr(owner, name), count(1)

    def deadly(*arguments: Any, **others: Any) -> Any:
        if name == "save" and isinstance(arguments[1], BytesIO):  # what goes to other processes
            return function(*arguments, **others)
        is_last = next(calls) == int(call)
        if is_last and name != "save":
            end()
        result = function(*arguments, **others)
        if is_last:
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            end()
        return result

    set_attribute(owner, name, deadly)
