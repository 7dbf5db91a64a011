"""Replacing names of RecBole's: the one way in which this package changes its host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


class View(ModuleType):
    """A module as one importer sees it: some names replaced, all others passed on."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names, _viewed=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_viewed"], name)


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
