"""What the tests share: small RecBole models on made-up sequences, and a real MovieLens-100K."""

from __future__ import annotations

import os

import pytest
import torch

import cprec_recbole  # noqa: F401  (registers the models)
from tests.builders import HOSTS, World


@pytest.fixture(scope="session", autouse=True)
def scratch_folder(tmp_path_factory: pytest.TempPathFactory):
    """RecBole writes log/, saved/ and log_tensorboard/ into the current folder."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("scratch"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A made-up data set: 60 users, 40 items, Zipf-like popularity."""
    return World.made_up(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=HOSTS)
def host_name(request: pytest.FixtureRequest) -> str:
    """Each of RecBole's three models in turn."""
    return request.param
