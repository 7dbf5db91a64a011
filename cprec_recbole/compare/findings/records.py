"""A JSON object whose fields are asked for by kind, with errors that name the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cprec_recbole.config import CompressionError


class Record:
    """A JSON object whose fields are asked for by kind; what is not finite counts as not there."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    def text(self, name: str, default: str | None = None) -> str:
        """A text; the default where it is missing."""
        value = self.content.get(name, default)
        if not isinstance(value, str):
            raise refusal(self.path, f"`{name}` as a text", value)
        return value

    def number(self, name: str) -> float | None:
        """A number, or None."""
        value = self.content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refusal(self.path, f"`{name}` as a number", value)
        return value if _finite(value) else None

    def whole(self, name: str) -> int | None:
        """A whole number, or None."""
        value = self.number(name)
        if value is not None and value != int(value):
            raise refusal(self.path, f"`{name}` as a whole number", value)
        return None if value is None else int(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object, empty where it is missing."""
        value = self.content.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise refusal(self.path, f"`{name}` as an object", value)
        return value

    def inside(self, name: str, key: str) -> Record:
        """An object within an object."""
        value = self.mapping(name)[key]
        if not isinstance(value, dict):
            raise refusal(self.path, f"`{name}.{key}` as an object", value)
        return Record(self.path, value)

    def numbers(self, name: str) -> dict[str, float]:
        """The finite numbers of an object, by name."""
        fields = Record(self.path, self.mapping(name))
        found = {key: fields.number(key) for key in fields.content}
        return {key: value for key, value in found.items() if value is not None}

    def items(self, name: str) -> list[Any]:
        """A list, empty where it is missing."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, list):
            raise refusal(self.path, f"`{name}` as a list", value)
        return value or []

    def series(self, name: str) -> tuple[float, ...]:
        """A list of numbers, NaN where one is not finite."""
        entries = Record(self.path, {str(i): v for i, v in enumerate(self.items(name))})
        return tuple(
            math.nan if (value := entries.number(key)) is None else value for key in entries.content
        )

    def needed(self, value: float | None, name: str) -> float:
        """The number itself; an error where there is none."""
        if value is None:
            raise refusal(self.path, f"`{name}` as a finite number", None)
        return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def refusal(path: Path, expected: str, got: Any) -> CompressionError:
    """The error for a file that is not what it should be."""
    what = got if isinstance(got, str) else json.dumps(got, default=str)
    return CompressionError(
        f"Expected {path} to hold {expected}, but got {what[:200]}; "
        "remove the file and repeat the run."
    )
