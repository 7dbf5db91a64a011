"""What RecBole 1.2.1, of NumPy 1, torch before 2.6 and ray 2.6, needs to know the compressed models
and to run on current libraries: mended in its own modules, for nobody else in the process."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging import getLogger
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from cprec_recbole.config import CompressionConfig, CompressionError, is_near, reject_unknown
from cprec_recbole.host.numbering import check_checkpoint_numbering, remember
from cprec_recbole.host.patching import Values, replace_all, replaces, view
from cprec_recbole.host.provider import importing_models, provider, register_model

_PLAIN = (str, int, float, list, tuple, dict, bool, type(None))


def _trusting_load(file: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.load as RecBole means it: its checkpoints are pickles that hold its Config."""
    return torch.load(file, *args, **{"weights_only": False, **kwargs})


def _load_numbers(file: Any, **options: Any) -> Any:
    """np.load without pickle: LDiffRec lets a file of the data set run code."""
    return np.load(file, **{**options, "allow_pickle": False})


class _DokMatrix(scipy.sparse.dok_matrix):
    """SciPy's, with the method by which RecBole's graph models fill it."""

    def _update(self, data: dict[tuple[int, int], float]) -> None:
        self._dict.update(data)


_REMOVED = {"bool": np.bool_, "int": np.int_, "long": np.int64, "float": np.float64, "str": np.str_}
# by the name that RecBole's modules give a library: the library, and what they see in its place
_LIBRARIES = {
    "np": (np, view(np, load=_load_numbers, **_REMOVED)),
    "torch": (torch, view(torch, load=_trusting_load)),
    "sp": (scipy.sparse, view(scipy.sparse, dok_matrix=_DokMatrix)),
}
_WARNINGS = (
    "The given NumPy array is not writable",
    r".*GradScaler\(args",
    "The inplace keyword in DataFrame",
    "A value is being set on a copy of a DataFrame",
)


def _adapt_libraries() -> None:  # of the RecBole modules imported so far
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("recbole."):
            for name, (library, seen) in _LIBRARIES.items():
                if getattr(module, name, None) is library:
                    setattr(module, name, seen)


@contextmanager
def ray_if_possible() -> Iterator[None]:
    """Within: `from ray import tune` works. Afterwards: sys.modules knows no stand-in. RecBole
    needs ray for its own search of hyper-parameters only; `report` of the stand-in tells nobody."""
    before, stand_in = set(sys.modules), None
    try:
        importlib.import_module("ray.tune")
    except Exception:  # whatever a broken ray raises: missing modules, removed NumPy names
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "ray":
                del sys.modules[name]
        stand_in = sys.modules["ray"] = ModuleType("ray")
        stand_in.tune = SimpleNamespace(report=lambda **metrics: None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if stand_in is not None:
            del sys.modules["ray"]


@replaces("recbole.config.Config.compatibility_settings")
def _compatibility_settings(original: Callable, self: Any) -> None:
    _adapt_libraries()  # RecBole would put removed names back into NumPy for everybody


@replaces("recbole.config.Config._convert_config_dict")
def _convert_config_dict(original: Callable, self: Any, given: dict[str, Any]) -> dict[str, Any]:
    # RecBole calls eval for each text, in a function where `key` and `param` are names too
    if isinstance(given, Values):
        return dict(given)
    return {name: _literal(value) for name, value in given.items()}


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(value.lower(), value)
    return found if isinstance(found, _PLAIN) else value


@replaces("recbole.config.Config._load_internal_config_dict")
def _load_internal_config_dict(
    original: Callable, self: Any, model: str, model_class: Any, dataset: str
) -> None:
    _adapt_libraries()  # the model's module has just been imported
    spec = getattr(model_class, "spec", None)
    original(self, spec.name if spec else model, model_class, dataset)
    given, defaults = self.external_config_dict, self.internal_config_dict
    if spec:
        _register_subclass(model_class)
        _check_compression(given, defaults, spec)
        names = CompressionConfig.option_names()
        defaults.update({name: getattr(CompressionConfig(), name) for name in names})
        defaults["training"] = spec.objectives[0]
    loss_type = given.get("loss_type", defaults.get("loss_type"))
    if model_class.type.name == "SEQUENTIAL" and loss_type in ("CE", "NLL"):
        # overall.yaml samples negatives, which Config then refuses for a CE model
        defaults["train_neg_sample_args"] = None


def _register_subclass(model_class: type) -> None:
    from recbole.utils import get_model

    known = None
    with suppress(ValueError, ImportError):  # of lightgbm, among whose models it looks last
        known = get_model(model_class.__name__)
    if known is not None and not hasattr(known, "spec"):
        raise CompressionError(
            f"Expected `model` to have a name of its own, but {model_class.__name__} is one of "
            "RecBole's models, whose trainer it would get; rename it."
        )
    if known is None or known.__module__ != "cprec_recbole.models":
        register_model(model_class)


def _check_compression(given: dict[str, Any], defaults: dict[str, Any], spec: Any) -> None:
    """Refuse a compression option that does not fit, and what is nearly one, since RecBole takes
    any key. Options of RecBole's other models, which a file for several may hold, give a warning.
    """
    from cprec_recbole.host.library import model_options

    names = CompressionConfig.option_names()
    known = (*names, "checkpoint_steps", "shard_tails")
    for name in given:
        if name in defaults or name in known or not is_near(name, known):
            continue
        if name not in model_options():
            reject_unknown([name], known)
        warnings.warn(
            f"`{name}` is an option of another of RecBole's models and is not read here; "
            f"compression has {', '.join(known)}.",
            stacklevel=2,
        )
    compression = CompressionConfig(**{name: given[name] for name in names if name in given})
    spec.check_loss(compression, given.get("loss_type", defaults.get("loss_type", "CE")))
    spec.check_training(given.get("training", spec.objectives[0]))


@replaces(
    "recbole.model.abstract_recommender.SequentialRecommender.__init__",
    "recbole.model.abstract_recommender.GeneralRecommender.__init__",
    "recbole.model.abstract_recommender.KnowledgeRecommender.__init__",
)
def _init_model(original: Callable, self: Any, config: Any, dataset: Any) -> None:
    from cprec_recbole.data.sequences import item_counts

    original(self, config, dataset)
    if hasattr(dataset, "inter_feat"):
        remember(self, config, dataset)
        if self.type.name == "SEQUENTIAL":
            self.train_item_counts = item_counts(dataset)


@replaces(
    "recbole.quick_start.load_data_and_model", "recbole.quick_start.quick_start.load_data_and_model"
)
def _load_data_and_model(original: Callable, model_file: str) -> tuple:
    """RecBole's function, but for its own torch.load. It runs whatever code is in the checkpoint or
    in the saved data set that its options name; `cprec compress` runs nothing of a file."""
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, init_logger, init_seed

    checkpoint = _trusting_load(model_file)
    config = checkpoint["config"]
    trained_with = dict(config.final_config_dict)  # a model that is built writes its own into it
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    getLogger().info(config)
    dataset = create_dataset(config)
    getLogger().info(dataset)
    check_checkpoint_numbering(model_file, trained_with, dataset)
    loaders = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, loaders[0]._dataset).to(config["device"])
    if hasattr(model, "user_embedding"):
        check_checkpoint_numbering(model_file, trained_with, dataset, "user")
    model.load_state_dict(checkpoint["state_dict"])
    model.load_other_parameter(checkpoint.get("other_parameter"))
    return config, model, dataset, *loaders


@replaces("recbole.quick_start.run", "recbole.quick_start.quick_start.run")
def _run(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """RecBole's `run`, whose processes know this package and need no GPU. What it was asked for on
    several machines is left to RecBole; torchrun starts those, too."""
    from recbole.config import Config

    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    nproc, size = given["nproc"], given["world_size"]
    if (nproc == 1 and size <= 0) or size not in (-1, nproc):
        return original(*args, **kwargs)
    reader = Config.__new__(Config)  # its `run` reads the command line, and texts as values
    options = reader._convert_config_dict(given["config_dict"] or {}) | reader._load_cmd_line()
    names = [given[name] or options.get(name, "") for name in ("model", "dataset")]
    own = {name: given[name] for name in ("nproc", "config_file_list", "saved")}
    return provider().run(*names, config_dict=options, **own)


def _trainer_by_name(name: str) -> Any:
    """The `__getattr__` of `recbole.trainer`, where RecBole looks for the trainer of a model."""
    from recbole.utils import get_model

    model = None
    if name.endswith("Trainer"):
        with suppress(ValueError, ImportError, AttributeError):
            model = get_model(name.removesuffix("Trainer"))
    if hasattr(model, "spec"):
        return provider().trainer()
    raise AttributeError(f"module 'recbole.trainer' has no attribute {name!r}")


def prepare() -> None:
    """Make RecBole run on this Python and know the compressed models; a second call is harmless."""
    with ray_if_possible():
        importlib.import_module("recbole.quick_start")
    with importing_models():
        importlib.import_module("recbole.model.sequential_recommender")
    # One of these may be on its way in: `recbole` does not have it as an attribute yet.
    from recbole import trainer
    from recbole.trainer import hyper_tuning
    from recbole.utils.argument_list import dataset_arguments, training_arguments

    # these import RecBole, and register what they replace
    from cprec_recbole.host import data, processes  # noqa: F401

    # hyperopt asks for a Generator since 0.2.7
    generators = view(np.random, RandomState=np.random.default_rng)
    hyper_tuning.np = view(_LIBRARIES["np"][1], random=generators)
    _LIBRARIES["pd"] = pd, view(pd, read_csv=data.read_csv)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=r"recbole\.")
    replace_all()
    _adapt_libraries()  # also of the modules that `replace_all` has imported
    if "training" not in dataset_arguments:  # a saved dataset is reused only where these agree
        dataset_arguments += ["training", "eval_args", "data_path"]
        training_arguments.append("checkpoint_steps")
    trainer.__getattr__ = _trainer_by_name
    provider().register_models()
