"""Replacing functions of RecBole's: the one way in which this package changes its host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


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
