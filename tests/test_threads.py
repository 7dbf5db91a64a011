"""How many threads a process works on, and how they wait: each case in a process of its own."""

import os
import subprocess
import sys

import pytest

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


def said(script, **environment):
    """What a fresh process prints."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return child.stdout.split()


@pytest.mark.parametrize(
    ("script", "environment", "policy"),
    [
        ("import cprec_recbole", {}, "PASSIVE"),
        ("import cprec_recbole", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ("import torch, cprec_recbole", {}, "None"),  # too late to say it
    ],
)
def test_waiting_threads_sleep(script, environment, policy):
    script += "; import os; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert said(script, **environment) == [policy]


THREADS = """
import torch
from cprec_recbole.threads import threads_for
torch.set_num_threads({chosen} or torch.get_num_threads())
default = torch.get_num_threads()
with threads_for({items}, 64) as n:
    assert n == torch.get_num_threads()
    print("default" if n == default else n)
assert torch.get_num_threads() == default
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is no second core")
@pytest.mark.parametrize(
    ("items", "chosen", "environment", "threads"),
    [
        (1683, 0, {}, "1"),
        (100_000, 0, {}, "default"),
        (1683, 3 * (os.cpu_count() or 1), {}, "default"),
        (1683, 0, {"OMP_NUM_THREADS": "2"}, "default"),
    ],
)
def test_small_models_work_on_one_thread_unless_the_user_says_so(
    items, chosen, environment, threads
):
    assert said(THREADS.format(items=items, chosen=chosen), **environment) == [threads]
