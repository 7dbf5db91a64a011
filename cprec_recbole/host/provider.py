"""What RecBole may ask the rooms above for, which RecBole's side does not import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES_OF_MODELS = "recbole.model.sequential_recommender"


@dataclass(frozen=True)
class Provider:
    """What RecBole may ask this package for; each function is called when RecBole does.

    Attributes:
        register_models: has `register_model` called for every compressed model.
        trainer: the trainer of the compressed models.
        run: `training.run.run`, which starts several processes.
    """

    register_models: Callable[[], Any]
    trainer: Callable[[], type]
    run: Callable[..., Any]


_current: Provider | None = None


def use(provider: Provider) -> None:
    """Have RecBole ask this provider from now on."""
    global _current
    _current = provider


def current() -> Provider:
    """The provider that RecBole asks."""
    assert _current is not None  # `use` is the first that this package does
    return _current


def register_model(model_class: type) -> None:
    """Let RecBole's `get_model` find a class by its name.

    It looks for a module of the name in lower case, and asks `sys.modules` first.
    """
    name = f"{MODULES_OF_MODELS}.{model_class.__name__.lower()}"
    module = ModuleType(name, f"Where RecBole looks for {model_class.__name__}.")
    module.__spec__ = ModuleSpec(name, loader=None, origin="cprec_recbole")
    setattr(module, model_class.__name__, model_class)
    sys.modules[name] = module


@contextmanager
def importing_models() -> Iterator[None]:
    """Within: imports of RecBole's model classes.

    One of its modules (sine.py) turns autograd's anomaly detection on for the whole process, which
    about doubles the time of a training step; afterwards it is what it was.
    """
    import torch

    was_on, checked_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(was_on, checked_nan)
