"""Names of version 0.1, which still work with a warning and go in 0.3."""

from __future__ import annotations

import warnings
from typing import Any

from cprec_recbole.models.spec import ModelSpec

_FIELDS = {"host": "model_class", "group": "layers_per_block"}


def backbone(**fields: Any) -> ModelSpec:
    """A ModelSpec by the names that its fields had as a `Backbone`."""
    return ModelSpec(**{_FIELDS.get(name, name): value for name, value in fields.items()})


def renamed(old: str, new: str) -> Any:
    """A property for the old name of an attribute."""

    def get(self: Any) -> Any:
        warnings.warn(
            f"`{old}` is called `{new}` since 0.2; the old name goes in 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(self, new)

    return property(get)
