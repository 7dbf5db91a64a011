"""Using RecBole as a library: a Config that does not read this process's command line."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.config import Config
from recbole.data import create_dataset, data_preparation

from cprec_recbole.config import CompressionError, check_choice, check_number, check_whole
from cprec_recbole.host.data import without_saved_data
from cprec_recbole.host.patching import Values

_PROPERTIES = Path(recbole.__file__).parent / "properties"
# what RecBole evaluates or unpickles; RecBole's own functions do, for a file that the user trusts
_RUNNING_CODE = ["dataset_save_path", "dataloaders_save_path", "pre_model_path", "pretrain_path"]
_RUNNING_CODE += ["mf_pretrain_path", "mlp_pretrain_path", "warm_up", "teacher"]
_READ_BY_NOTHING = {"config_file", "config_files", "config_file_list"}  # of RecBole's own lists
_WHOLE = {"train_batch_size": 1, "eval_batch_size": 1, "MAX_ITEM_LIST_LENGTH": 1, "eval_step": -1}
_WHOLE |= dict.fromkeys(("epochs", "stopping_step", "worker", "seed"), 0)  # the lowest of each


def recbole_config(
    model: str | type,
    dataset: str,
    options: dict[str, Any],
    config_files: Sequence[str] | None = None,
) -> Config:
    """A RecBole config of a model (its name or class); options win over YAML files. Unlike RecBole,
    `sys.argv` is not read, and no text is evaluated. A CompressionError for no such data set or
    file, and options that RecBole refuses, or that name code for it to run."""
    given: dict[str, Any] = {}
    for file in config_files or ():
        given |= read_options(file)
    given |= options
    for name in _RUNNING_CODE:
        if given.get(name):
            raise CompressionError(
                f"Expected no `{name}`, which RecBole unpickles or evaluates and so could run any "
                f"code, but got {given[name]!r}; leave it out, or call RecBole's own run_recbole() "
                "with what you trust."
            )
    # RecBole looks for files of its own by the name of a data set
    if dataset in ("", "..") or Path(dataset).name != dataset:
        raise CompressionError(
            f"Expected `dataset` to be the name of a folder in `data_path`, but got {dataset!r}."
        )
    argv = sys.argv
    sys.argv = argv[:1] or [""]
    try:
        with _recbole_errors("RecBole refuses these options: "):
            config = Config(model, dataset, config_dict=Values(given))
    finally:
        sys.argv = argv
    _check(config)
    return config


def recbole_dataset(config: Config) -> Any:
    """RecBole's data set of a config, from its files and filtered; never one that was saved."""
    with _data_errors(config), without_saved_data(config):
        return create_dataset(config)


def recbole_loaders(config: Config, dataset: Any) -> tuple[Any, Any, Any]:
    """RecBole's loaders of training, validation and test rows of a data set; never saved ones."""
    with _data_errors(config), without_saved_data(config):
        return data_preparation(config, dataset)


def recbole_model(config: Config, dataset: Any) -> Any:
    """The model of a config, fresh."""
    with fitting_options(config["model"]):
        return config.model_class(config, dataset)


@contextmanager
def _recbole_errors(message: str) -> Iterator[None]:
    try:
        yield
    except (CompressionError, OSError):
        raise
    except Exception as error:  # some are asserts
        # of an activation's name, say
        said = f"nothing is called {error}" if isinstance(error, KeyError) else in_a_line(error)
        raise CompressionError(message + said) from error


def fitting_options(model: str) -> AbstractContextManager[None]:
    """Within: what RecBole's own layers say of options is a CompressionError."""
    return _recbole_errors(f"Expected options that a {model} can have, but RecBole says: ")


def _data_errors(config: Config) -> AbstractContextManager[None]:
    return _recbole_errors(
        "Expected `dataset` to be one that RecBole reads and splits with these options, but of "
        f"{config['dataset']} in {config['data_path']} it says: "
    )


def in_a_line(error: BaseException) -> str:
    """What an error says, on one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class _Loader(yaml.SafeLoader):
    """YAML as RecBole reads it: `1e-3` is a number too. No tag makes anything of Python's."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """The value of a text in YAML; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read_options(file: str, name: str = "config") -> dict[str, Any]:
    """The names and values of a YAML file, or a CompressionError that names the option `name`."""
    try:
        options = read_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CompressionError(
            f"Expected `{name}` to be a YAML file, but {file} is none: {in_a_line(error)}"
        ) from error
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise CompressionError(f"Expected `{name}` to hold names and values, but {file} does not.")
    return options


def known_options(config: Config) -> list[str]:
    """The names of all options that RecBole or this package knows for a model."""
    arguments = [name for names in config.parameters.values() for name in names]
    return sorted({*config.internal_config_dict, *arguments} - _READ_BY_NOTHING)


def model_options(model: str = "*") -> set[str]:
    """The names of the options of one of RecBole's models, or of all; empty for another's."""
    files = (_PROPERTIES / "model").glob(f"{model}.yaml")
    return {name for file in files for name in read_yaml(file.read_text(encoding="utf-8")) or ()}


def _check(config: Config) -> None:
    """Refuse what RecBole takes, or refuses only once it gets there, perhaps after an epoch."""
    for name, lowest in _WHOLE.items():
        check_whole(name, config[name], lowest)
    rate, decay = config["learning_rate"], config["weight_decay"]
    if rate is not None:
        check_number("learning_rate", rate, "a number above 0", math.ulp(0.0), math.inf)
    if decay is not None:
        check_number("weight_decay", decay, "a number, 0 or more", 0, math.inf)
    split = config["eval_args"]["split"]
    if isinstance(split, dict) and "LS" in split:
        check_choice("LS", split["LS"], ("valid_and_test", "valid_only", "test_only"))
    if config["log_wandb"] and importlib.util.find_spec("wandb") is None:
        raise CompressionError(
            "Expected `log_wandb` with the package wandb, but it is not installed; install it, or "
            "leave the option out."
        )
    # RecBole offers to download a data set that it does not find, where it knows the name
    folder, name = config["data_path"], config["dataset"]
    known = read_yaml((_PROPERTIES / "dataset" / "url.yaml").read_text(encoding="utf-8"))
    if name not in known and not os.path.isdir(folder):
        raise CompressionError(
            "Expected `dataset` to be ml-100k, or the name of a folder in `data_path` that holds "
            f"{name}.inter, but {folder} does not exist."
        )


@contextmanager
def working_directory(folder: str) -> Iterator[None]:
    """Within: the current folder is another one."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
