"""What the tests share: small RecBole models on made-up sequences, and a real MovieLens-100K."""

from __future__ import annotations

import multiprocessing
import os
from importlib import import_module

# one thread: for models this small a second one only waits, and tests run beside each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch
from hypothesis import settings

import cprec_recbole  # noqa: F401  (registers the models)
from cprec_recbole.parallel import launch as processes
from tests.builders import HOSTS, World, train

# the same examples in every run: a test that fails once fails again. To look for new ones:
# pytest --hypothesis-profile default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# few tests, and slow ones: begun last they would keep one process busy while the other waits
LONGEST = ("processes", "resume", "study", "examples", "documents", "train_command")
LONGEST += ("large_data", "memory", "serve_in_browser", "page_in_browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first; all others as they were."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def scratch_folder(tmp_path_factory: pytest.TempPathFactory):
    """RecBole writes log/, saved/ and log_tensorboard/ into the current folder."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("scratch"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def few_drawn_histories():
    """The tests' models are tiny: a few histories are enough to fit their layers on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("cprec_recbole.compression.compress"), "FIT_HISTORIES", 128)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A made-up data set: 60 users, 40 items, Zipf-like popularity."""
    return World.made_up(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def trained(world: World):
    """RecBole's three models by name, trained for a while; not to be changed."""
    return {name: train(world.model(name), world, name) for name in HOSTS}


@pytest.fixture(scope="module")
def ready_processes():
    """Processes off a server that has imported everything, in place of ones that import it."""
    multiprocessing.set_forkserver_preload(["tests.children"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "START_METHOD", "forkserver")
        yield


@pytest.fixture(params=HOSTS)
def host_name(request: pytest.FixtureRequest) -> str:
    """Each of RecBole's three models in turn."""
    return request.param
