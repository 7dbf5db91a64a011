"""When RecBole is prepared and told of the compressed models: when it is first used.

Where RecBole runs in this process already, at once. Otherwise behind the first import of its
configuration, data sets, trainers or evaluation, which take seconds to import: a process that only
loads a folder and recommends needs none of them.

RecBole's side imports nothing of the rest of this package. What RecBole asks for is a Provider's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULES_OF_MODELS = "recbole.model.sequential_recommender"
_RUNS_RECBOLE = (
    "recbole.config",
    "recbole.data.dataset",
    "recbole.evaluator",
    "recbole.quick_start",
    "recbole.trainer",
)


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


provider: Provider  # that of the last `activate`


class _Finder(MetaPathFinder):
    """Prepares RecBole behind the first import of what runs it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith(f"{_MODULES_OF_MODELS}.cp"):  # `get_model` asks for one of ours
            provider.register_models()
            return getattr(sys.modules.get(name), "__spec__", None)
        if name not in _RUNS_RECBOLE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            spec.loader = _PreparingLoader(spec.loader, self)
        return spec


class _PreparingLoader(Loader):
    """Loads a module of RecBole as another loader does, then prepares all of RecBole."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from cprec_recbole.host import plugin

        try:
            with plugin.ray_if_possible():
                self.loader.exec_module(module)
            plugin.prepare()
        except BaseException:
            sys.meta_path.insert(0, self.finder)  # the next import tries again
            raise


def activate(of_package: Provider) -> None:
    """Prepare RecBole now where it runs in this process already, else when it first does."""
    global provider
    provider = of_package
    if any(name in sys.modules for name in _RUNS_RECBOLE):
        from cprec_recbole.host import plugin

        plugin.prepare()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register_model(model_class: type) -> None:
    """Let RecBole's `get_model` find a class by its name.

    It looks for a module of the name in lower case, and asks `sys.modules` first.
    """
    name = f"{_MODULES_OF_MODELS}.{model_class.__name__.lower()}"
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
