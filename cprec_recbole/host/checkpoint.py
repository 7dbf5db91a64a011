"""RecBole's checkpoints, a zip of one pickle and of the bytes of each storage, read without running
any code in them: the unpickler gets a stand-in for every function and class that is named."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import posixpath
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError

_NUMBERS = "float64 float32 float16 bfloat16 complex128 complex64 int64 int32 int16 int8 uint8 bool"
_DTYPES = {  # torch.FloatStorage and so on
    torch.empty(0, dtype=dtype).type().replace("Tensor", "Storage"): dtype
    for dtype in (getattr(torch, name) for name in _NUMBERS.split())
}
_LEFT_OUT = ("recbole.utils.enum_type", "cprec_recbole.models")
_PATHS = "(Pure)?(Posix|Windows)Path"
_DEEPEST = 8  # RecBole's options are lists in dicts in dicts


class Checkpoint(NamedTuple):
    """What a checkpoint of RecBole says of a model."""

    model: str
    dataset: str
    # what it was trained with: numbers, strings, truth values, None, and lists, tuples and dicts of
    # these; a device, an enum or a class is left out
    options: dict[str, Any]
    state: dict[str, Tensor]  # on the CPU; tensors share memory where the model's did
    epoch: int  # after which it was written, from 0


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read what RecBole's trainer wrote and run nothing of it. A CompressionError for no file, a
    damaged one, none of RecBole's, or one that asks for code."""
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        raise CompressionError(
            f"Expected `checkpoint` to be a file that can be read, but {path} is none."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, os.path.getsize(path))
    except Exception as error:  # damage to a zip or a pickle may raise any
        kind = "" if isinstance(error, UnpicklingError) else f"{type(error).__name__}: "
        problem = f"is damaged or not RecBole's: {shown(f'{kind}{error}')}"
        if isinstance(error, _Refused):
            problem = f"asks for {shown(str(error))}; it was not run. Do not trust this file."
        raise CompressionError(
            f"Expected `checkpoint` to hold what RecBole writes, but {path} {problem}"
        ) from error


def shown(text: str) -> str:
    """A file's own words, for a message: short, on one line, no control characters."""
    return text[:100].encode("unicode_escape").decode()


class _Refused(Exception):
    """The name of what a checkpoint asks for and must not get."""


class _Config(dict):
    """RecBole's Config: its attributes by name."""

    __setstate__ = dict.update


@dataclass
class _Named:
    """A function or a class that the pickle names, or what a call of it returns."""

    name: str
    arguments: tuple = ()

    def __call__(self, *arguments: Any) -> object:
        make = _ALLOWED.get(self.name)
        return make(*arguments) if make else _Named(self.name, arguments)

    def __setstate__(self, state: object) -> None:
        """Sets nothing; without this method the unpickler would set attributes."""


def _number(dtype: _Named, data: bytes) -> object:
    """A number of NumPy's: the same of Python's."""
    kind = dtype.arguments[0]
    if not re.fullmatch("[fiub][1248]", kind):
        raise _Refused(f"numpy.dtype({kind})")
    return np.frombuffer(data, f"<{kind}").item()


def _getattr(owner: object, name: object) -> object:
    """By which Python 3.11.2, Debian 12's, pickles an enum."""
    if not (isinstance(owner, _Named) and owner.name.startswith(_LEFT_OUT[0])):
        raise _Refused("builtins.getattr")
    return owner


# where there is a function, a call returns what it does
_ALLOWED: dict[str, Callable[..., object] | None] = {
    **dict.fromkeys(_DTYPES),
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes, in protocol 2
    "__builtin__.getattr": _getattr,
    "builtins.getattr": _getattr,
    "numpy.dtype": None,
    "numpy.core.multiarray.scalar": _number,  # NumPy 1
    "numpy._core.multiarray.scalar": _number,
    "pathlib": lambda *parts: posixpath.join("", *parts)[:4096],  # as text; none is longer
    "torch.device": None,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch._utils._rebuild_tensor_v2": None,  # see _tensors
    "yaml.loader.FullLoader": None,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        whole = f"{module}.{name}"
        if whole == "collections.OrderedDict":
            return OrderedDict
        if whole == "recbole.config.configurator.Config":
            return _Config
        if module in ("pathlib", "pathlib._local") and re.fullmatch(_PATHS, name):
            return _Named("pathlib")
        if whole in _ALLOWED or module in _LEFT_OUT or module.startswith("recbole.model."):
            return _Named(whole)
        raise _Refused(whole)

    def persistent_load(self, pid: object) -> object:
        return pid  # a storage; see _tensors


def _read(archive: zipfile.ZipFile, size: int) -> Checkpoint:
    """The checkpoint in a zip of `size` bytes; raises anything if it is damaged."""
    entries = _entries(archive, size)
    data = archive.read(entries["data.pkl"])
    for opcode, argument, _ in pickletools.genops(data):  # raises where a length is beyond the end
        # the unpickler makes room for as many objects as a PUT counts
        counted = argument or 0 if opcode.name.endswith("PUT") else 0
        if opcode.name.startswith("EXT") or counted > len(data):
            raise UnpicklingError("its pickle uses an opcode as RecBole's does not")
    match _Unpickler(io.BytesIO(data)).load():
        case {
            "config": {"final_config_dict": {"model": str(model), "dataset": str(name)} as final},
            "state_dict": dict(state),
            "epoch": int(epoch),
        }:
            options = {k: v for k, v in final.items() if isinstance(k, str) and _is_plain(v)}
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
    if sum(f.file_size for f in files) > size or len(entries) < len(files):
        raise UnpicklingError("it is compressed, or its entries overlap")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != sys.byteorder.encode():
        raise UnpicklingError(f"its numbers are not {sys.byteorder}-endian")
    return entries


def _tensors(
    state: dict[Any, Any], archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]
) -> dict[str, Tensor]:
    """The tensors of a state_dict; those that look at one storage share it."""

    @cache
    def storage(dtype: torch.dtype, key: str, n: int) -> Tensor:
        entry = entries.get(f"data/{key}")
        if entry is None or entry.file_size != n * dtype.itemsize:
            raise UnpicklingError("a storage of it is missing, or has another size than it should")
        data = np.frombuffer(bytearray(archive.read(entry)), np.uint8)  # writable
        return torch.from_numpy(data).view(dtype)

    tensors = {}
    for name, value in state.items():
        match name, value:
            case str(), _Named("torch._utils._rebuild_tensor_v2", (stored, *view, _, _)):
                (_, kind, key, _, n), (offset, size, stride) = stored, view
            case _:
                raise UnpicklingError("its state_dict holds what is no tensor")
        tensor = storage(_DTYPES[kind.name], key, n).as_strided(size, stride, offset)
        # torch takes sizes below 0, and views that repeat numbers, of which one fills the memory
        if tensor.numel() > n or min(tensor.shape, default=0) < 0:
            raise UnpicklingError("a tensor of it does not lie within its storage")
        tensors[name] = tensor
    return tensors


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether a value is plain through and through, and has an end."""
    if isinstance(value, dict | list | tuple):
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_plain(part, depth + 1) for part in parts)
    return isinstance(value, str | int | float | None)
