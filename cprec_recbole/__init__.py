"""CpRec for RecBole: small and fast sequential recommenders. Importing it registers the models.

The names are those of `__init__.pyi`. Each is imported when it is used, and RecBole when it is: a
process that loads a folder and recommends needs neither RecBole's data sets nor its trainers, whose
import takes seconds.
"""

import importlib
import warnings
from typing import Any

import lazy_loader

from cprec_recbole.threads import let_threads_sleep

let_threads_sleep()  # before anything imports torch

from cprec_recbole.host.provider import Provider  # noqa: E402
from cprec_recbole.host.registration import activate  # noqa: E402

__version__ = "0.1.0"

_from_stub, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "Backbone":
        warnings.warn(
            "`Backbone` is called `ModelSpec` since 0.2, `host` `model_class` and `group` "
            "`layers_per_block`; the old names go in 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return importlib.import_module("cprec_recbole.models.spec").backbone
    return _from_stub(name)


activate(
    Provider(
        register_models=lambda: importlib.import_module("cprec_recbole.models"),
        trainer=lambda: importlib.import_module("cprec_recbole.training.trainer").CompressedTrainer,
        run=lambda *args, **kwargs: _from_stub("run")(*args, **kwargs),
    )
)
