"""Train and eval mode, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Within: no dropout in any of the models; afterwards each part is in the mode it had."""
    before = [(m, m.training) for model in models if model is not None for m in model.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
