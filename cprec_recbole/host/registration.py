"""When RecBole is prepared and told of the models: when it is first used.

Where RecBole is imported already, at once. Otherwise with the first import of anything that runs
RecBole: its data, its trainer, its configuration take seconds to import, and a process that only
loads a folder and recommends needs none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# what of this package does not run RecBole; any other of its modules is a reason to register
_WITHOUT_RECBOLE = frozenset(
    {
        *("backbones", "cli", "config", "embedding", "fields", "files", "item_tables", "models"),
        *("int8", "losses", "modes", "optimizers", "outcome", "partition", "recommender"),
        *("records", "report", "sharing", "softmax", "units"),
        *("commands", "commands.export", "commands.recommend", "compression"),
        *("compression.quantize", "compression.spectra", "host", "host.registration"),
    }
)
_PACKAGES_WITHOUT_RECBOLE = frozenset({"parallel", "saving", "search", "serving"})
_RUNNING = ("recbole.config", "recbole.data", "recbole.trainer", "recbole.quick_start")


class _Finder(MetaPathFinder):
    """Registers before the first import of what runs RecBole."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        ours = package == "cprec_recbole" and _runs_recbole(rest)
        if not rest or not (package == "recbole" or ours):
            return None
        register_now()
        module = sys.modules.get(name)
        if module is None:
            return None
        # it was imported on the way: Python takes a module's own spec, and would run it once more
        spec = ModuleSpec(name, _Imported(module))
        module.__spec__ = spec
        return spec


class _Imported(Loader):
    """Loads what is there already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _runs_recbole(module: str) -> bool:
    """Whether a module of this package runs RecBole, or imports what does."""
    room = module.partition(".")[0]
    return module not in _WITHOUT_RECBOLE and room not in _PACKAGES_WITHOUT_RECBOLE


_FINDER = _Finder()


def register_when_needed() -> None:
    """Register now where RecBole runs in this process already, else when it first does."""
    if any(name in sys.modules for name in _RUNNING):
        register_now()
    elif _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def register_now() -> None:
    """Register, if that is not done."""
    waiting = _FINDER in sys.meta_path
    if waiting:
        sys.meta_path.remove(_FINDER)
    try:
        from cprec_recbole.host.plugin import adapt

        adapt()
    except BaseException:
        if waiting:
            sys.meta_path.insert(0, _FINDER)
        raise


@contextmanager
def importing_models() -> Iterator[None]:
    """Within: imports of RecBole's model classes, which are no reason to register.

    One of its modules (sine.py) turns autograd's anomaly detection on for the whole process, which
    about doubles the time of a training step; afterwards it is what it was.
    """
    import torch

    was_on, checked_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    waiting = _FINDER in sys.meta_path
    if waiting:
        sys.meta_path.remove(_FINDER)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(was_on, checked_nan)
        if waiting:
            sys.meta_path.insert(0, _FINDER)
