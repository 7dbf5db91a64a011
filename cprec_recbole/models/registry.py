"""The compressed models that are known: the ten of this package, and those that `register` adds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from cprec_recbole.config import CompressionError
from cprec_recbole.models.spec import ModelSpec

if TYPE_CHECKING:
    from cprec_recbole.models.recommender import CompressedRecommender

MODELS: list[type[CompressedRecommender]] = []


def spec_of(model: nn.Module) -> ModelSpec:
    """The spec of one of RecBole's own models.

    Raises:
        CompressionError: not one of the supported models. A subclass may compute something else
            than its parent, so it is refused too.
    """
    for known in MODELS:
        if type(model) is known.spec.model_class:
            return known.spec
    names = ", ".join(known.spec.name for known in MODELS)
    raise CompressionError(
        f"Expected `model` to be one of RecBole's {names}, but got {type(model).__name__}; a model "
        "of your own is made known with cprec_recbole.register()."
    )


def spec_named(name: str) -> ModelSpec:
    """The spec of a supported model by RecBole's name of it."""
    return next(known.spec for known in MODELS if known.spec.name == name)


def compressed_class(spec: ModelSpec) -> type[CompressedRecommender]:
    """The class of the compressed models of a spec."""
    return next(known for known in MODELS if known.spec is spec)


def model_class_named(name: str) -> type[CompressedRecommender]:
    """The class of a compressed model by its name; a CompressionError where it is not known."""
    known = {model.__name__: model for model in MODELS}
    if name not in known:
        raise CompressionError(
            f"Expected `model` to be one of {', '.join(known)}, but got {name!r}."
        )
    return known[name]
