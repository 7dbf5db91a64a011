"""When RecBole is prepared and told of the compressed models: when it is first used.

Where it runs in this process already, at once; otherwise behind the first import of what takes
seconds to import, which a process that loads a folder and recommends does not need. RecBole's side
imports nothing of the rooms above: what RecBole asks them for is a Provider's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from cprec_recbole.host.provider import MODULES_OF_MODELS, Provider, provider, use

_RUNS_RECBOLE = {f"recbole.{name}" for name in ("config", "evaluator", "quick_start", "trainer")}
_RUNS_RECBOLE.add("recbole.data.dataset")


def activate(of_package: Provider) -> None:
    """Prepare RecBole now where it runs in this process already, else when it first does."""
    use(of_package)
    if _RUNS_RECBOLE & sys.modules.keys():
        from cprec_recbole.host import plugin

        plugin.prepare()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Prepares RecBole behind the first import of what runs it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.startswith(f"{MODULES_OF_MODELS}.cp"):  # `get_model` asks for one of ours
            provider().register_models()
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
