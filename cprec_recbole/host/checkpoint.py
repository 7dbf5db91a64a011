"""RecBole's checkpoints, read without running any code that is in them.

A checkpoint is a zip of one pickle and of the bytes of each storage. Where the pickle names a
function or a class, the unpickler gets a stand-in of ours, which only describes.
"""

from __future__ import annotations

import io
import os
import pickle
import posixpath
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pickle import UnpicklingError
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError

_LEFT_OUT = ("recbole.utils.enum_type", "cprec_recbole.models")
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")  # of NumPy
_SCALARS = (str, int, float, bool, type(None))
_MOST_DIMENSIONS = 16  # of a tensor; RecBole's have four at most
_LONGEST = 4096  # of a text that is copied, so that few bytes of a file do not fill the memory
_MOST_VALUES = 100_000  # of the options; lists of one list, many times over, never end
# opcodes that hash what they take, know objects without a name, or reserve memory before they read
_REFUSED = pickle.DICT + pickle.FROZENSET + pickle.ADDITEMS
_REFUSED += pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.BYTEARRAY8


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
    expected = f"Expected `checkpoint` to hold what RecBole writes, but {path}"
    damaged = f"{expected} is damaged or not RecBole's"
    try:
        with open(path, "rb") as file:
            return _read(file)
    except _Refused as refused:
        raise CompressionError(
            f"{expected} asks for {refused}; it was not run. Do not trust this file."
        ) from None
    except UnpicklingError as error:
        raise CompressionError(f"{damaged}: {shown(str(error))}") from error
    except Exception as error:  # damage to a zip or a pickle may raise any
        reason = f"{type(error).__name__}: {error}"
        raise CompressionError(f"{damaged}: {shown(reason)}") from error


def shown(text: str) -> str:
    """A file's own words, for a message: short, on one line, no control characters."""
    return text[:100].encode("unicode_escape").decode()


class _Refused(Exception):
    """The name of what a checkpoint asks for and must not get."""


class _Config:
    """RecBole's Config; the state holds its attributes."""

    state: object = None


def _left_out(*args: object) -> object:
    """A class whose objects do not matter, and each of them."""
    return _left_out


def _getattr(owner: object, name: object) -> object:
    """By which Python 3.11.2, Debian 12's, pickles an enum."""
    if owner is not _left_out:
        raise _Refused("builtins.getattr")
    return _left_out


def _path(*parts: str) -> str:
    """A path, which RecBole takes for a folder: its text."""
    if sum(map(len, parts)) > _LONGEST:
        raise UnpicklingError("a path of it is too long")
    return posixpath.join("", *parts)


def _encode(text: str, encoding: object) -> bytes:
    """By which protocol 2 spells the bytes of NumPy's numbers."""
    if len(text) > _LONGEST:
        raise UnpicklingError("bytes of it are too long")
    return text.encode("latin1")


def _dtype(name: str, align: object, copy: object) -> np.dtype:
    """A number's type in NumPy."""
    if name not in _NUMBERS:
        raise _Refused(f"numpy.dtype({shown(name)})")
    return np.dtype(f"<{name}")


def _scalar(dtype: object, data: bytes) -> object:
    """A number of NumPy's: the same of Python's."""
    if not isinstance(dtype, np.dtype):  # NumPy would make one of nested lists
        raise UnpicklingError("a number of it has no type")
    return np.frombuffer(data, dtype).item()


_STAND_INS: dict[str, object] = {
    "_codecs.encode": _encode,
    "__builtin__.getattr": _getattr,
    "builtins.getattr": _getattr,
    "collections.OrderedDict": lambda: {},
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,  # NumPy 1
    "numpy._core.multiarray.scalar": _scalar,
    "recbole.config.configurator.Config": _Config,
    "torch.device": _left_out,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch._utils._rebuild_tensor_v2": lambda *arguments: arguments,  # see _tensors
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "yaml.loader.FullLoader": _left_out,
}


class _Unpickler(pickle._Unpickler):
    """Makes the description of a checkpoint, and runs nothing.

    It is Python's own unpickler and not its C twin, in which a memo index of ten bytes takes
    gigabytes, and nothing stops a dict from hashing nested tuples for ever.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("recbole.model.") or module in _LEFT_OUT:
            return _left_out
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _path
        if f"{module}.{name}" not in _STAND_INS:
            raise _Refused(shown(f"{module}.{name}"))
        return _STAND_INS[f"{module}.{name}"]

    def persistent_load(self, pid: object) -> object:
        return pid  # see _tensors

    def load_build(self) -> None:
        """Give an object its state: only a Config keeps it, and no attribute is set by its name."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, _Config):
            made.state = state
        elif not isinstance(made, dict | np.dtype):  # whose states say nothing more
            raise UnpicklingError("its pickle gives a state to what has none")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if any(type(key) not in _SCALARS for key in keys) or type(self.stack[-1]) is not dict:
            raise UnpicklingError("its pickle adds to what is no dict, or by an unusual key")
        self.stack[-1].update(zip(keys, values, strict=True))

    def _refuse(self) -> None:
        raise UnpicklingError("its pickle uses an opcode that RecBole's does not")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys(_REFUSED, _refuse),
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _read(file: IO[bytes]) -> Checkpoint:
    """The checkpoint in an open file; raises anything if it is damaged."""
    with zipfile.ZipFile(file) as archive:
        entries = _entries(archive, os.fstat(file.fileno()).st_size)
        match _Unpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load():
            case {
                "config": _Config(
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
    state: dict[str, Any], archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]
) -> dict[str, Tensor]:
    """The tensors of a state_dict; those that look at one storage share it.

    A tensor is the arguments of `_rebuild_tensor_v2`: its storage as torch names it, offset, size,
    stride, whether it takes gradients, and hooks.
    """
    storages: dict[tuple[str, torch.dtype], Tensor] = {}
    tensors = {}
    for name, value in state.items():
        match name, value:
            case str(), [["storage", torch.dtype() as dtype, str(key), str(), int(n)], *view, _, _]:
                offset, size, stride = view
            case _:
                raise UnpicklingError("its state_dict holds what is no tensor")
        entry = entries.get(f"data/{key}")
        if entry is None or entry.file_size != n * dtype.itemsize:
            raise UnpicklingError("a storage of it is missing, or has another size than it should")
        if (key, dtype) not in storages:
            data = np.frombuffer(bytearray(archive.read(entry)), np.uint8)  # writable
            storages[key, dtype] = torch.from_numpy(data).view(dtype)
        tensor = storages[key, dtype].as_strided(size, stride, offset)  # raises outside of it
        # torch takes sizes below 0, and views that repeat numbers, of which one fills the memory
        sizes = tensor.shape
        if tensor.numel() > n or len(sizes) > _MOST_DIMENSIONS or min(sizes, default=0) < 0:
            raise UnpicklingError("a tensor of it does not lie within its storage")
        tensors[name] = tensor
    return tensors


def _is_plain(value: object, seen: Iterator[int]) -> bool:
    """Whether a value is plain through and through; `seen` counts the values of all options."""
    if next(seen) > _MOST_VALUES:
        raise UnpicklingError("its options have no end")
    if type(value) is dict:
        return all(_is_plain(part, seen) for part in value.values())
    if type(value) is list or type(value) is tuple:
        return all(_is_plain(part, seen) for part in value)
    return type(value) in _SCALARS
