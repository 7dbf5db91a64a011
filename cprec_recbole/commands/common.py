"""What the commands share: values as YAML writes them, compression options, the console."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import yaml
from rich.console import Console

from cprec_recbole.config import (
    OBJECTIVES,
    SHARING_SCHEMES,
    SOFTMAXES,
    CompressionConfig,
    CompressionError,
)
from cprec_recbole.host.library import read_options
from cprec_recbole.records import BACKBONES, record_named

MODELS = tuple(backbone.host.__name__ for backbone in BACKBONES)
TABLE_WIDTH = 140
# RecBole's options that are texts, whatever they look like in YAML: intervals such as [5,inf) too
TEXTS = (
    *("data_path", "checkpoint_dir", "dataset_save_path", "dataloaders_save_path"),
    *("user_inter_num_interval", "item_inter_num_interval", "field_separator", "seq_separator"),
)


def console() -> Console:
    """A terminal as wide as it is; a file or a pipe as wide as the tables are."""
    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


def add_compression(parser: argparse.ArgumentParser, *, training: bool = True) -> None:
    """Let a command take the compression options, and RecBole YAML files that hold them."""
    group = parser.add_argument_group("compression")
    group.add_argument("--ranks", type=numbers, metavar="64,16,4")
    group.add_argument("--cutoffs", type=numbers, metavar="400,900 or 0.1,0.3")
    group.add_argument("--sharing", metavar="{" + ",".join(SHARING_SCHEMES) + "}")
    group.add_argument("--softmax", metavar="{" + ",".join(SOFTMAXES) + "}")
    group.add_argument("--tied", type=value, metavar="{true,false}")
    if training:
        group.add_argument("--training", metavar="{" + ",".join(OBJECTIVES) + "}")
        parser.add_argument(
            "--config", action="append", default=[], metavar="FILE", help="a RecBole YAML file"
        )


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The compression options that were given: the files', then the command line's."""
    names = CompressionConfig.option_names()
    found: dict[str, Any] = {}
    for file in getattr(options, "config", []):
        found |= {name: value for name, value in read_options(file).items() if name in names}
    given = {name: getattr(options, name, None) for name in names}
    return found | {name: value for name, value in given.items() if value is not None}


def compression_for(model: str, options: argparse.Namespace) -> CompressionConfig:
    """The compression that was asked for, for one of RecBole's models."""
    record, given = record_named(model), given_options(options)
    compression = CompressionConfig(**{"training": record.objectives[0], **given})
    record.check_objective(compression.training)
    return compression


def plain_text(text: str) -> str | None:
    """A text as it stands, without quotation marks around it; None for YAML's null."""
    if text in ("null", "~"):
        return None
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return str(yaml.safe_load(text)) if is_quoted else text  # "\t" is a tab


def value(text: str) -> Any:
    """A value as YAML writes it; `64,16,4` is a list and `1e-3` a number too."""
    try:
        found = yaml.safe_load(text)
        if isinstance(found, str) and "," in found and not found.startswith(("[", "{")):
            found = yaml.safe_load(f"[{found}]")
    except yaml.YAMLError as error:
        raise CompressionError(f"Expected a value as in YAML, but got {text!r}.") from error
    is_number = isinstance(found, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", found)
    return float(found) if is_number else found


def numbers(text: str) -> Any:
    """A list of numbers; one number is a list of one."""
    found = value(text)
    return [found] if isinstance(found, int | float) else found
