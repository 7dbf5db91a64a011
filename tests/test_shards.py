"""Tail blocks spread over processes: equal to one process (in shards_child.py), and smaller."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cprec_recbole.parallel.exchange import Group

ROOT = Path(__file__).parents[1]


def torchrun(world: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run a module in several processes, by torch's own launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc_per_node={world}", "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_compute_what_one_does(world):
    done = torchrun(world, "tests.shards_child")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("as one process") == world


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 7, 8, 1000])
def test_every_row_is_in_one_process(world, size):
    shares = [Group(rank, world).rows(size) for rank in range(world)]
    rows = [row for share in shares for row in range(share.start, share.stop)]
    assert rows == list(range(size))
    assert [len(part) for part in torch.arange(size).chunk(world)] == [
        share.stop - share.start for share in shares if share.stop > share.start
    ]


def test_one_process_has_no_group():
    assert Group.current() is None
