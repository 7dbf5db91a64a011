"""What the commands share: values as YAML writes them, compression options, the console."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console

from cprec_recbole.config import (
    OBJECTIVES,
    ROUNDINGS,
    SHARING_SCHEMES,
    SOFTMAXES,
    CompressionConfig,
    CompressionError,
)
from cprec_recbole.host.library import read_options, read_yaml
from cprec_recbole.models import MODELS as COMPRESSED
from cprec_recbole.models import spec_named

MODELS = tuple(model.spec.name for model in COMPRESSED)
TABLE_WIDTH = 140
# RecBole's options that are texts, whatever they look like in YAML: intervals such as [5,inf) too
TEXTS = ["USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "RATING_FIELD", "LABEL_FIELD"]
TEXTS += ["ITEM_LIST_LENGTH_FIELD", "POSITION_FIELD", "LIST_SUFFIX", "NEG_PREFIX", "encoding"]
TEXTS += ["data_path", "checkpoint_dir", "dataset_save_path", "dataloaders_save_path"]
TEXTS += ["user_inter_num_interval", "item_inter_num_interval", "wandb_project"]
TEXTS += ["field_separator", "seq_separator"]


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
        group.add_argument("--rounding", metavar="{" + ",".join(ROUNDINGS) + "}")
        parser.add_argument(
            "--config", action="append", default=[], metavar="FILE", help="a RecBole YAML file"
        )
        for name in ("config_files", "config-files", "config_file", "config-file"):  # RecBole's
            parser.add_argument(
                f"--{name}", dest="config", action="extend", type=str.split, help=argparse.SUPPRESS
            )


def from_files(options: argparse.Namespace) -> dict[str, Any]:
    """The options in the files of `--config`; a later file wins."""
    found: dict[str, Any] = {}
    for file in getattr(options, "config", []):
        found |= read_options(file)
    return found


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The compression options that were given: the files', then the command line's."""
    names = CompressionConfig.option_names()
    found = {name: value for name, value in from_files(options).items() if name in names}
    given = {name: getattr(options, name, None) for name in names}
    return found | {name: value for name, value in given.items() if value is not None}


def dataset_of(options: argparse.Namespace) -> str:
    """The data set that was named: on the command line, else in a file, else the bundled one."""
    return _name(options, "dataset") or "ml-100k"


def model_of(options: argparse.Namespace, names: Sequence[str] | None = None) -> str:
    """The model that was named, on the command line or in a file: one of `names`, if given."""
    model = _name(options, "model")
    if model is None or (names is not None and model not in names):
        wanted = f"one of {', '.join(names)}" if names else "the name of a model"
        got = "none; use --model, or name it in the file of --config" if model is None else model
        raise CompressionError(f"Expected `model` to be {wanted}, but got {got}.")
    return model


def _name(options: argparse.Namespace, option: str) -> str | None:
    name = getattr(options, option) or from_files(options).get(option)
    if name is not None and not isinstance(name, str):
        raise CompressionError(f"Expected `{option}` to be a name, but got {name!r}.")
    return name


def compression_for(model: str, options: argparse.Namespace) -> CompressionConfig:
    """The compression that was asked for, for one of RecBole's models."""
    spec, given = spec_named(model), given_options(options)
    compression = CompressionConfig(**{"training": spec.objectives[0], **given})
    spec.check_training(compression.training)
    return compression


def plain_text(text: str) -> str | None:
    """A text as it stands, without quotation marks around it; None for YAML's null."""
    if text in ("null", "~"):
        return None
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return str(read_yaml(text)) if is_quoted else text  # "\t" is a tab


def value(text: str) -> Any:
    """A value as YAML writes it; `64,16,4` is a list and `1e-3` a number too."""
    try:
        found = read_yaml(text)
        if isinstance(found, str) and "," in found and not found.startswith(("[", "{")):
            found = read_yaml(f"[{found}]")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CompressionError(f"Expected a value as in YAML, but got {text!r}.") from error
    return found


def numbers(text: str) -> Any:
    """A list of numbers; one number is a list of one."""
    found = value(text)
    return [found] if isinstance(found, int | float) else found
