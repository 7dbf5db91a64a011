"""CpRec for RecBole: small and fast sequential recommenders. Importing it registers the models.

Names are imported when they are used, and RecBole when it is: a process that loads a folder and
recommends needs neither RecBole's data nor its trainers, whose import takes seconds.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.host.registration import register_when_needed

if TYPE_CHECKING:
    from recbole.quick_start import load_data_and_model, run_recbole

    from cprec_recbole.backbones import Backbone
    from cprec_recbole.compress import compress
    from cprec_recbole.compression.quantize import quantize
    from cprec_recbole.embedding import BlockEmbedding
    from cprec_recbole.models import (
        CpBERT4Rec,
        CpGCSAN,
        CpGRU4Rec,
        CpLightSANs,
        CpNARM,
        CpNextItNet,
        CpSASRec,
        CpSINE,
        CpSRGNN,
        CpSTAMP,
    )
    from cprec_recbole.partition import Partition
    from cprec_recbole.recommender import CompressedRecommender
    from cprec_recbole.recover import recover
    from cprec_recbole.registry import register
    from cprec_recbole.saving.pretrained import load_pretrained
    from cprec_recbole.saving.vocabulary import Vocabulary
    from cprec_recbole.search.topk import TopK
    from cprec_recbole.serving.export import export
    from cprec_recbole.softmax import FullSoftmax, TreeSoftmax
    from cprec_recbole.training.evaluation import evaluate
    from cprec_recbole.training.run import run

__version__ = "0.1.0"
__all__ = [
    "Backbone",
    "BlockEmbedding",
    "CompressedRecommender",
    "CompressionConfig",
    "CompressionError",
    "CpBERT4Rec",
    "CpGCSAN",
    "CpGRU4Rec",
    "CpLightSANs",
    "CpNARM",
    "CpNextItNet",
    "CpSASRec",
    "CpSINE",
    "CpSRGNN",
    "CpSTAMP",
    "FullSoftmax",
    "Partition",
    "TopK",
    "TreeSoftmax",
    "Vocabulary",
    "compress",
    "evaluate",
    "export",
    "load_data_and_model",
    "load_pretrained",
    "quantize",
    "recover",
    "register",
    "run",
    "run_recbole",
]

_PLACES = {
    "Backbone": "cprec_recbole.backbones",
    "BlockEmbedding": "cprec_recbole.embedding",
    "CompressedRecommender": "cprec_recbole.recommender",
    "CpBERT4Rec": "cprec_recbole.models",
    "CpGCSAN": "cprec_recbole.models",
    "CpGRU4Rec": "cprec_recbole.models",
    "CpLightSANs": "cprec_recbole.models",
    "CpNARM": "cprec_recbole.models",
    "CpNextItNet": "cprec_recbole.models",
    "CpSASRec": "cprec_recbole.models",
    "CpSINE": "cprec_recbole.models",
    "CpSRGNN": "cprec_recbole.models",
    "CpSTAMP": "cprec_recbole.models",
    "FullSoftmax": "cprec_recbole.softmax",
    "Partition": "cprec_recbole.partition",
    "TopK": "cprec_recbole.search.topk",
    "TreeSoftmax": "cprec_recbole.softmax",
    "Vocabulary": "cprec_recbole.saving.vocabulary",
    "compress": "cprec_recbole.compress",
    "evaluate": "cprec_recbole.training.evaluation",
    "export": "cprec_recbole.serving.export",
    "load_data_and_model": "recbole.quick_start",
    "load_pretrained": "cprec_recbole.saving.pretrained",
    "quantize": "cprec_recbole.compression.quantize",
    "recover": "cprec_recbole.recover",
    "register": "cprec_recbole.registry",
    "run": "cprec_recbole.training.run",
    "run_recbole": "recbole.quick_start",
}


class _Package(ModuleType):
    """A package in which `compress` is the function, also once the module of that name is imported:
    Python puts a module into its package under its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _PLACES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register_when_needed()
