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

from cprec_recbole.config import CompressionError


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
        CompressionError: no such data set, or no such file.
    """
    for file in config_files or []:
        if not os.path.isfile(file):
            raise CompressionError(f"Expected `config` to be a YAML file, but {file} is none.")
    argv = sys.argv
    sys.argv = argv[:1] or [""]
    try:
        config = Config(
            model, dataset, config_file_list=config_files or None, config_dict=dict(options)
        )
    finally:
        sys.argv = argv
    _check_dataset(config)
    return config


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
