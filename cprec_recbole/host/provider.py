"""What RecBole may ask the rooms above, which its side never imports, and where it finds models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

MODULES_OF_MODELS = "recbole.model.sequential_recommender"


class Provider(NamedTuple):
    """What RecBole may ask this package for; each function is called when RecBole asks."""

    register_models: Callable[[], Any]  # calls `register_model` for every compressed model
    trainer: Callable[[], type]  # the trainer of the compressed models
    run: Callable[..., Any]  # `training.run.run`, which starts several processes


_current: Provider  # since `use`, which is the first that this package does


def use(of_package: Provider) -> None:
    """Have RecBole ask this provider."""
    global _current
    _current = of_package


def provider() -> Provider:
    """The provider that RecBole asks."""
    return _current


def register_model(model_class: type) -> None:
    """Let RecBole's `get_model` find a class by its name: it looks for a module of the name in
    lower case, and asks `sys.modules` first."""
    name = f"{MODULES_OF_MODELS}.{model_class.__name__.lower()}"
    module = ModuleType(name, f"Where RecBole looks for {model_class.__name__}.")
    module.__spec__ = ModuleSpec(name, loader=None, origin="cprec_recbole")
    setattr(module, model_class.__name__, model_class)
    sys.modules[name] = module


@contextmanager
def importing_models() -> Iterator[None]:
    """Within: imports of RecBole's model classes, of which one (sine.py) turns autograd's anomaly
    detection on for the whole process. That doubles the time of a step; it is turned back after."""
    import torch

    was_on, checked_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(was_on, checked_nan)
