"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from numbers import Integral

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def n_bytes(size: object) -> int | None:
    """A size such as `"2MB"`, `"512 KiB"` or a whole number of bytes, `2e6` too; None where it is
    none of them, or less than a byte."""
    if isinstance(size, float) and size.is_integer():
        size = int(size)
    if isinstance(size, Integral) and not isinstance(size, bool):
        return int(size) if int(size) >= 1 else None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", size) if isinstance(size, str) else None
    if not found or found[2].lower() not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2].lower()]) or None
