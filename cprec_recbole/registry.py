"""register(): a model of one's own, made known to this package and to RecBole."""

from __future__ import annotations

from typing import Any

from recbole.model.abstract_recommender import SequentialRecommender

from cprec_recbole import models
from cprec_recbole.backbones import Backbone
from cprec_recbole.config import CompressionError
from cprec_recbole.host.plugin import register_model
from cprec_recbole.models import MODELS
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.records import BACKBONES


def register(record: Backbone) -> type[CompressedRecommender]:
    """Make a sequential model of one's own known: from now on `compress` takes it, and RecBole
    builds and trains its compressed form by name.

    RecBole has no default options for such a model; give all that it reads. A process that shall
    load or train it (`load_pretrained`, `run(nproc=2)`) has to register it too.

    Args:
        record: the model's class, and what compression has to know of it.

    Returns:
        The class `Cp<name>` of the compressed models.

    Raises:
        CompressionError: no record, no sequential model of RecBole's kind, or a name that is taken.
    """
    if not isinstance(record, Backbone):
        raise CompressionError(
            f"Expected `record` to be a Backbone, but got {type(record).__name__}; see "
            "docs/your-own-model.md."
        )
    host: Any = record.host
    if not (isinstance(host, type) and issubclass(host, SequentialRecommender)):
        raise CompressionError(
            f"Expected `host` to be a class made from RecBole's SequentialRecommender, but got "
            f"{getattr(host, '__name__', host)!r}."
        )
    if issubclass(host, CompressedRecommender):
        raise CompressionError(
            f"Expected `host` to be an uncompressed model, but got {host.__name__}."
        )
    name = f"Cp{host.__name__}"
    if name.lower() in {model.__name__.lower() for model in MODELS}:  # RecBole's modules are lower
        raise CompressionError(
            f"Expected `host` to have a name of its own, but {name} is known already; rename it."
        )
    about = {"__doc__": f"{host.__name__}, compressed.", "__module__": models.__name__}
    model_class = type(name, (CompressedRecommender,), {"record": record, **about})
    setattr(models, name, model_class)  # RecBole's checkpoints name the class by where it is
    BACKBONES.append(record)
    MODELS.append(model_class)
    register_model(model_class)
    return model_class
