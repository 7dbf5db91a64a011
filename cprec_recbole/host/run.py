"""RecBole's own `run`, whose processes would import RecBole alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recbole.config import Config

from cprec_recbole.training.run import run


def starting_the_plugin_too(original: Callable) -> Callable:
    """RecBole's `run`, whose processes know this package and need no GPU.

    What it was asked for on several machines is left to RecBole; torchrun starts those, too.
    """

    def run_with_plugin(
        model: str | None,
        dataset: str | None,
        config_file_list: list[str] | None = None,
        config_dict: dict[str, Any] | None = None,
        saved: bool = True,
        nproc: int = 1,
        world_size: int = -1,
        ip: str = "localhost",
        port: str = "5678",
        group_offset: int = 0,
    ) -> Any:
        if (nproc == 1 and world_size <= 0) or world_size not in (-1, nproc):
            return original(
                *(model, dataset, config_file_list, config_dict, saved),
                *(nproc, world_size, ip, port, group_offset),
            )
        reader = Config.__new__(Config)  # its `run` reads the command line, and texts as values
        options = reader._convert_config_dict(config_dict or {}) | reader._load_cmd_line()
        return run(
            model or options.get("model", ""),
            dataset or options.get("dataset", ""),
            nproc=nproc,
            config_file_list=config_file_list,
            config_dict=options,
            saved=saved,
        )

    return run_with_plugin
