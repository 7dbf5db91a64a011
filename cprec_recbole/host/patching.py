"""Replacing functions of RecBole's: the one way in which this package changes RecBole."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

_REPLACEMENTS: list[tuple[str, Callable[[Callable], Callable]]] = []


class View(ModuleType):
    """A module as one importer sees it: some names replaced, all others passed on."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names, _viewed=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_viewed"], name)


def replaces(*places: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have `replace_all` put a function in the place of some of RecBole's.

    Args:
        places: their full names, such as `recbole.config.Config._init_device`.

    Returns:
        A decorator. The function gets the original one first, then what that is called with.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(original: Callable) -> Callable:
            return lambda *args, **kwargs: function(original, *args, **kwargs)

        _REPLACEMENTS.extend((place, make) for place in places)
        return function

    return register


def replace_all() -> None:
    """Make all replacements that are registered; a second time changes nothing."""
    for place, make in _REPLACEMENTS:
        owner, _, name = place.rpartition(".")
        replace(pkgutil.resolve_name(owner), name, make)


def replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function of RecBole's by one made from it; a second time changes nothing.

    Args:
        owner: a class or a module of RecBole's.
        name: the function's name there.
        make: takes the original and returns what stands in its place.
    """
    original = getattr(owner, name)
    if not hasattr(original, "_cprec_original"):
        replacement = functools.wraps(original)(make(original))
        replacement._cprec_original = original  # type: ignore[attr-defined]
        setattr(owner, name, replacement)


class Values(dict[str, Any]):
    """Options that are values already; RecBole's Config evaluates the texts among others."""


def is_ours(config: Any) -> bool:
    """Whether a RecBole config is of a compressed model, or of the user's own class of one."""
    return hasattr(config.model_class, "spec")
