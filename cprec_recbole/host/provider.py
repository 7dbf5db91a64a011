"""When RecBole is prepared and told of the compressed models: when it is first used.

Where it runs in this process already, at once; otherwise behind the first import of what takes
seconds to import, which a process that loads a folder and recommends does not need. RecBole's side
imports nothing of the rooms above: what RecBole asks them for is a Provider's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NamedTuple

_MODULES_OF_MODELS = "recbole.model.sequential_recommender"
_RUNS_RECBOLE = {f"recbole.{name}" for name in ("config", "evaluator", "quick_start", "trainer")}
_RUNS_RECBOLE.add("recbole.data.dataset")


class Provider(NamedTuple):
    """What RecBole may ask this package for; each function is called when RecBole asks."""

    register_models: Callable[[], Any]  # calls `register_model` for every compressed model
    trainer: Callable[[], type]  # the trainer of the compressed models
    run: Callable[..., Any]  # `training.run.run`, which starts several processes


_current: Provider  # since `activate`, which is the first that this package does


def activate(of_package: Provider) -> None:
    """Prepare RecBole now where it runs in this process already, else when it first does."""
    global _current
    _current = of_package
    if _RUNS_RECBOLE & sys.modules.keys():
        from cprec_recbole.host import plugin

        plugin.prepare()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def provider() -> Provider:
    """The provider that RecBole asks."""
    return _current


class _Finder(MetaPathFinder):
    """Prepares RecBole behind the first import of what runs it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith(f"{_MODULES_OF_MODELS}.cp"):  # `get_model` asks for one of ours
            _current.register_models()
            return getattr(sys.modules.get(name), "__spec__", None)
        spec = PathFinder.find_spec(name, path) if name in _RUNS_RECBOLE else None
        if spec is None or spec.loader is None:
            return None
        sys.meta_path.remove(self)
        load = spec.loader.exec_module

        def load_and_prepare(module: ModuleType) -> None:
            from cprec_recbole.host import plugin

            try:
                with plugin.ray_if_possible():
                    load(module)
                plugin.prepare()
            except BaseException:
                sys.meta_path.insert(0, self)  # the next import tries again
                raise

        spec.loader.exec_module = load_and_prepare  # type: ignore[method-assign]
        return spec


def register_model(model_class: type) -> None:
    """Let RecBole's `get_model` find a class by its name: it looks for a module of the name in
    lower case, and asks `sys.modules` first."""
    name = f"{_MODULES_OF_MODELS}.{model_class.__name__.lower()}"
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
