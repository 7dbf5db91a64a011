"""RecBole's checkpoints, read without running any code that is in them.

A checkpoint is a zip of one pickle and of the bytes of each storage. The pickle is carried out by
`unpickle.py`, which describes what it would make; out of that description come the plain options
and the tensors.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.host.unpickle import (
    SCALARS,
    Refused,
    SavedConfig,
    SavedStorage,
    SavedView,
    shown,
    unpickled,
)

_MOST_VALUES = 100_000  # of the options; lists of one list, many times over, never end


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint of RecBole says of a model.

    Attributes:
        model: RecBole's name of the model.
        dataset: RecBole's name of the data set.
        options: the options it was trained with: numbers, strings, truth values, None, and lists,
            tuples and dicts of these; a device, an enum or a class is left out.
        state: the model's `state_dict`, on the CPU; tensors share memory where the model's did.
        epoch: the epoch after which it was written, from 0.
    """

    model: str
    dataset: str
    options: dict[str, Any]
    state: dict[str, Tensor]
    epoch: int


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read what RecBole's trainer wrote; nothing that the file names is imported or run.

    Raises:
        CompressionError: no file, a damaged one, none of RecBole's, or one that asks for code.
    """
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        raise CompressionError(
            f"Expected `checkpoint` to be a file that can be read, but {path} is none."
        )
    try:
        with open(path, "rb") as file:
            return _read(file)
    except Refused as refused:
        raise CompressionError(
            f"Expected `checkpoint` to hold what RecBole writes, but {path} asks for {refused}; it "
            "was not run. Do not trust this file."
        ) from None
    except Exception as error:  # damage to a zip or a pickle may raise any
        ours = isinstance(error, UnpicklingError)
        reason = shown(str(error) if ours else f"{type(error).__name__}: {error}")
        raise CompressionError(
            f"Expected `checkpoint` to hold what RecBole writes, but {path} is damaged or not "
            f"RecBole's: {reason}"
        ) from error


def _read(file: IO[bytes]) -> Checkpoint:
    """The checkpoint in an open file; raises anything if it is damaged."""
    with zipfile.ZipFile(file) as archive:
        entries = _entries(archive, os.fstat(file.fileno()).st_size)
        match unpickled(archive.read(entries["data.pkl"]), entries):
            case {
                "config": SavedConfig(
                    state={
                        "final_config_dict": {"model": str(model), "dataset": str(name)} as final
                    }
                ),
                "state_dict": dict(state),
                "epoch": int(epoch),
            }:
                seen = count()
                options = {k: v for k, v in final.items() if type(k) is str and _is_plain(v, seen)}
                return Checkpoint(model, name, options, _tensors(state, archive, entries), epoch)
        raise UnpicklingError("it lacks a config, a state_dict or an epoch")


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The parts of a zip of `size` bytes, by name, without the folder that torch puts them in."""
    files = archive.infolist()
    roots = [f.filename[: -len("data.pkl")] for f in files if f.filename.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UnpicklingError("it holds no data.pkl")
    entries = {f.filename.removeprefix(roots[0]): f for f in files}
    if "constants.pkl" in entries:
        raise UnpicklingError("it is a TorchScript archive")
    # torch compresses nothing; and so nothing here takes more memory than the file has bytes
    if any(f.compress_type != zipfile.ZIP_STORED or f.file_size != f.compress_size for f in files):
        raise UnpicklingError("it is compressed")
    if len(entries) != len(files) or sum(f.file_size for f in files) > size:
        raise UnpicklingError("its entries overlap")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != sys.byteorder.encode():
        raise UnpicklingError(f"its numbers are not {sys.byteorder}-endian")
    return entries


def _tensors(
    state: dict[str, Any], archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]
) -> dict[str, Tensor]:
    """The tensors of a state_dict; those that look at one storage share it."""
    storages: dict[SavedStorage, Tensor] = {}
    for name, view in state.items():
        if not isinstance(name, str) or not isinstance(view, SavedView):
            raise UnpicklingError("its state_dict holds what is no tensor")
        if view.storage not in storages:
            key, dtype, length = view.storage
            data = bytearray(archive.read(entries[f"data/{key}"]))  # writable
            empty = torch.empty(0, dtype=dtype, device="cpu")  # `frombuffer` does not make one
            storages[view.storage] = torch.frombuffer(data, dtype=dtype) if length else empty
    return {name: storages[v.storage].as_strided(*v[1:]) for name, v in state.items()}


def _is_plain(value: object, seen: Iterator[int]) -> bool:
    """Whether a value is plain through and through; `seen` counts the values of all options."""
    if next(seen) > _MOST_VALUES:
        raise UnpicklingError("its options have no end")
    if type(value) is dict:
        return all(_is_plain(part, seen) for part in value.values())
    if type(value) is list or type(value) is tuple:
        return all(_is_plain(part, seen) for part in value)
    return type(value) in SCALARS
