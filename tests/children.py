"""What the tests have other processes do; a function here goes to them by its name."""

from __future__ import annotations

import os
import signal
import sys
import threading
from itertools import count
from typing import Any

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


def joined() -> int:
    """Join the group without RecBole; returns the rank."""
    place = group.place
    assert place is not None
    group.join(place, gpus=False)
    return place.rank


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
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
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


def curves(
    world: World, cases: list[tuple[str, dict[str, Any]]], sparse: bool = False
) -> list[dict[str, Any]]:
    """Train each model; what came of it.

    Args:
        world: the data set.
        cases: names of models and their options.
        sparse: whether small blocks may have sparse gradients, too.
    """
    if sparse:
        BlockEmbedding.look_up_sparsely.__defaults__ = (1,)
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
    }


def metrics(world: World, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
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


def carry_out(jobs: list[Job], alone: bool = True) -> list[dict[str, Any]]:
    """The results of jobs, one after the other."""
    if alone:
        group.place = None
    return [train_here(job) for job in jobs]


def carry_out_and_die(job: Job, death: str, alone: bool = True) -> None:
    """A job whose last process is killed at some moment.

    Args:
        job: what to carry out.
        death: `half N` in the middle of the N-th writing of a file of ours; `name N` before the
            N-th call of that function.
        alone: whether it is one process's.
    """
    place = group.place
    assert place is not None
    if alone:
        group.place = None
    name, call = death.split()
    if place.rank == place.size - 1:
        if name == "half":
            die_within_a_write(int(call))
        else:
            owner = next(
                owner for owner in (CompressedTrainer, Journal, os) if hasattr(owner, name)
            )
            kill_before(owner, name, int(call))
    train_here(job)


def die_within_a_write(call: int) -> None:
    """Have this process killed when half of the `call`-th file is written."""
    original, calls = torch.save, count(1)

    def half(state: Any, file: Any, **options: Any) -> None:
        original(state, file, **options)
        if next(calls) == call:
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def kill_before(owner: Any, name: str, call: int) -> None:
    """Have this process killed when a function is called for the `call`-th time."""
    original, calls = getattr(owner, name), count(1)

    def deadly(*arguments: Any, **others: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **others)

    setattr(owner, name, deadly)
