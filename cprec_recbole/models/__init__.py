"""The compressed models: the ten of this package, and those that `register` adds."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from cprec_recbole.config import CompressionError
from cprec_recbole.host.provider import importing_models, register_model
from cprec_recbole.models.known import TEN
from cprec_recbole.models.recommender import CompressedRecommender, compressed_class
from cprec_recbole.models.saving import load_model
from cprec_recbole.models.spec import ModelSpec

with importing_models():
    from recbole.model.abstract_recommender import SequentialRecommender

MODELS: list[type[CompressedRecommender]] = []


def _add(model_class: type[CompressedRecommender]) -> None:
    globals()[model_class.__name__] = model_class  # checkpoints name a class by where it is
    MODELS.append(model_class)
    register_model(model_class)


for _model in TEN:
    _add(_model)


def spec_of(model: nn.Module) -> ModelSpec:
    """The spec of one of RecBole's own models; a CompressionError for any other. A subclass may
    compute something else than its parent, so it is refused too."""
    for known in MODELS:
        if type(model) is known.spec.model_class:
            return known.spec
    names = ", ".join(known.spec.name for known in MODELS)
    raise CompressionError(
        f"Expected `model` to be one of RecBole's {names}, but got {type(model).__name__}; make a "
        "model of your own known with cprec_recbole.register()."
    )


def spec_named(name: str) -> ModelSpec:
    """The spec of a supported model by RecBole's name of it."""
    return next(known.spec for known in MODELS if known.spec.name == name)


def class_of(spec: ModelSpec) -> type[CompressedRecommender]:
    """The class of the compressed models of a spec."""
    return next(known for known in MODELS if known.spec is spec)


def load_pretrained(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu", engine: str = "auto"
) -> CompressedRecommender:
    """Load a model that `save_pretrained` wrote; no data set and no RecBole configuration needed.

    Args:
        folder: what `save_pretrained` was given.
        device: where the model shall be.
        engine: see `CompressedRecommender.engine`. The graph for `onnx` and `auto` is made for the
            first answer, and kept in the folder if that can be written.

    Returns:
        The model in eval mode, with the scores, item ids and tokens that it was saved with.

    Raises:
        CompressionError: no model, one of a newer format, or files that are missing, cut short,
            changed, or do not belong together; the message says which. Or `onnx` that cannot be
            had.
    """
    model = load_model(folder, {model.__name__: model for model in MODELS}).to(device).eval()
    model.engine = engine
    return model


def register(spec: ModelSpec) -> type[CompressedRecommender]:
    """Make a sequential model of one's own known: from now on `compress` takes it, and RecBole
    builds and trains its compressed form, the class `Cp<name>` that is returned, by name.

    RecBole has no default options for such a model; give all that it reads. A process that shall
    load or train it (`load_pretrained`, `run(nproc=2)`) has to register it too.

    Raises:
        CompressionError: no spec, no sequential model of RecBole's kind, or a name that is taken.
    """
    if not isinstance(spec, ModelSpec):
        raise CompressionError(
            f"Expected `spec` to be a ModelSpec, but got {type(spec).__name__}; see "
            "docs/your-own-model.md."
        )
    own: Any = spec.model_class
    is_recboles = isinstance(own, type) and issubclass(own, SequentialRecommender)
    if not is_recboles or issubclass(own, CompressedRecommender):
        raise CompressionError(
            "Expected `model_class` to be a class made from RecBole's SequentialRecommender, and "
            f"none that is compressed, but got {getattr(own, '__name__', own)!r}."
        )
    name = f"Cp{own.__name__}"
    if name.lower() in {model.__name__.lower() for model in MODELS}:  # RecBole's modules are lower
        raise CompressionError(
            f"Expected `model_class` to have a name of its own, but {name} is known already; "
            "rename it."
        )
    model_class = compressed_class(spec)
    _add(model_class)
    return model_class
