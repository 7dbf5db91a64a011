"""Using RecBole as a library: a Config that does not read this process's command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model

from cprec_recbole.config import CompressionError, is_number


def recbole_config(
    model: str, dataset: str, options: dict[str, Any], config_files: list[str] | None = None
) -> Config:
    """A RecBole config from its arguments alone.

    RecBole's Config also parses `sys.argv`, which belongs to whoever called us.

    Args:
        model: RecBole's name of the model.
        dataset: RecBole's name of the data set.
        options: RecBole options; they win over the files.
        config_files: YAML files.

    Raises:
        CompressionError: no such data set, no such file, or options that RecBole refuses.
    """
    for file in config_files or []:
        read_options(file)
    argv = sys.argv
    sys.argv = argv[:1] or [""]
    try:
        config = Config(
            model, dataset, config_file_list=config_files or None, config_dict=dict(options)
        )
    except CompressionError:
        raise
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
        raise CompressionError(f"RecBole refuses these options: {error}") from error
    finally:
        sys.argv = argv
    _check_numbers(config)
    _check_dataset(config)
    return config


def recbole_dataset(config: Config) -> Any:
    """RecBole's data set of a config, read and filtered.

    Raises:
        CompressionError: files that RecBole cannot read with these options.
    """
    with _reading(config):
        return create_dataset(config)


def recbole_loaders(config: Config, dataset: Any) -> tuple[Any, Any, Any]:
    """RecBole's loaders of the training, validation and test rows of a data set.

    Raises:
        CompressionError: a data set that cannot be split with these options.
    """
    with _reading(config):
        return data_preparation(config, dataset)


def recbole_model(config: Config, dataset: Any) -> Any:
    """The model of a config, fresh.

    Raises:
        CompressionError: options that no such model can have.
    """
    with fitting_options(config["model"]):
        return get_model(config["model"])(config, dataset)


@contextmanager
def fitting_options(model: str) -> Iterator[None]:
    """Where RecBole's own layers are built: what they say of options is of the user's.

    Raises:
        CompressionError: options that no such model can have.
    """
    try:
        yield
    except CompressionError:
        raise
    except (ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, KeyError):  # of an activation's name, say
            said = f"nothing is called {said}"
        raise CompressionError(
            f"Expected options that a {model} can have, but RecBole says: {said}"
        ) from error


@contextmanager
def _reading(config: Config) -> Iterator[None]:
    """Within: what RecBole says of data that it cannot read is an error of one line."""
    try:
        yield
    except CompressionError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CompressionError(
            f"Expected `dataset` to be one that RecBole reads and splits with these options, but "
            f"of {config['dataset']} in {config['data_path']} it says: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error


def read_options(file: str, name: str = "config") -> dict[str, Any]:
    """The names and values of a YAML file.

    Args:
        file: its path.
        name: of the option that the file was given as.

    Raises:
        CompressionError: no file, or none that holds names and values.
    """
    try:
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CompressionError(
            f"Expected `{name}` to be a YAML file, but {file} is none: {reason}"
        ) from error
    if not isinstance(options, dict):
        raise CompressionError(f"Expected `{name}` to hold names and values, but {file} does not.")
    return options


def whole_number(config: Config, name: str, lowest: int = 1) -> int:
    """An option that has to be a whole number, `lowest` or more; else a CompressionError."""
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise CompressionError(
            f"Expected `{name}` to be a whole number, {lowest} or more, but got {value!r}."
        )
    return value


def known_options(config: Config) -> list[str]:
    """The names of all options that RecBole or this package knows for a model."""
    arguments = [name for names in config.parameters.values() for name in names]
    return sorted({*config.internal_config_dict, *arguments})


def _check_numbers(config: Config) -> None:
    """RecBole takes anything, and fails once it computes with it."""
    lowest = {"train_batch_size": 1, "eval_batch_size": 1, "epochs": 0, "stopping_step": 0}
    for name, least in {**lowest, "seed": 0}.items():
        whole_number(config, name, least)
    for name, words, fits in (
        ("learning_rate", "a number above 0", lambda rate: rate > 0),
        ("weight_decay", "a number, 0 or more", lambda decay: decay >= 0),
    ):
        value = config[name]
        if value is not None and not (is_number(value) and fits(value)):
            raise CompressionError(f"Expected `{name}` to be {words}, but got {value!r}.")


def _check_dataset(config: Config) -> None:
    """RecBole offers to download a data set that it does not find, where it knows the name."""
    folder, name = config["data_path"], config["dataset"]
    known = Path(recbole.__file__).parent / "properties" / "dataset" / "url.yaml"
    if not os.path.isdir(folder) and name not in yaml.safe_load(known.read_text(encoding="utf-8")):
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
