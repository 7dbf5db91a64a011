"""How many threads PyTorch works on, and how they wait: by default they spin, and where another
program takes a core, a product of 0.3 ms was measured to take 10 ms."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LARGE_TABLE = 2**20  # numbers; products with a smaller one gain little from a second thread


def let_threads_sleep() -> None:
    """Let waiting threads sleep, unless the user said how they wait."""
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it once


@contextmanager
def threads_for(n_items: int, dim: int) -> Iterator[int]:
    """Within: as many threads as a model with a table `[n_items, dim]` gains from, and how many.
    A number that the user set, by OMP_NUM_THREADS or `torch.set_num_threads`, stays."""
    import psutil
    import torch

    before = torch.get_num_threads()
    defaults = {os.cpu_count(), psutil.cpu_count(logical=False)}
    is_chosen = before not in defaults or any(name in os.environ for name in _SETTINGS)
    if is_chosen or n_items * dim >= _LARGE_TABLE:
        yield before
        return
    torch.set_num_threads(1)
    try:
        yield 1
    finally:
        torch.set_num_threads(before)
