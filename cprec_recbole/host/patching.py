"""Replacing functions of RecBole's: the one way in which this package changes RecBole."""

from __future__ import annotations

import builtins
import functools
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

_REPLACEMENTS: list[tuple[str, Callable[..., Any]]] = []


def view(module: ModuleType, **names: Any) -> ModuleType:
    """A module as one importer sees it: some names replaced, all others passed on."""
    seen = ModuleType(module.__name__)
    seen.__dict__.update(names, __getattr__=functools.partial(getattr, module))
    return seen


def replaces(*places: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have `replace_all` put a function in the place of RecBole's of these full names. It gets the
    original one first (None where RecBole has none), then what that is called with."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _REPLACEMENTS.extend((place, function) for place in places)
        return function

    return register


def replace_all() -> None:
    """Make all replacements that are registered; a second time changes nothing."""
    for place, function in _REPLACEMENTS:
        owner, _, name = place.rpartition(".")
        _replace(pkgutil.resolve_name(owner), name, function)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    original: Any = getattr(owner, name, getattr(builtins, name, None))
    if hasattr(original, "_cprec_original"):
        return

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    replacement._cprec_original = original  # type: ignore[attr-defined]
    setattr(owner, name, functools.wraps(original)(replacement))


class Values(dict[str, Any]):
    """Options that are values already; RecBole's Config evaluates the texts among others."""


def is_ours(config: Any) -> bool:
    """Whether a RecBole config is of a compressed model, or of the user's own class of one."""
    return hasattr(config.model_class, "spec")
