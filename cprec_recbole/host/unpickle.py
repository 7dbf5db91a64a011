"""A pickle, carried out opcode by opcode without running any code that it names.

Nothing is imported, no attribute is set by its name, and what a pickle may call are the few
functions below, which only describe: a checkpoint's options, and where its tensors lie.

Not with pickle.Unpickler: whatever names it is let to find, a file of ten bytes makes it take
gigabytes (LONG_BINPUT), and one of 200 makes it hash a tuple of tuples for ever.
"""

from __future__ import annotations

import math
import pickletools
import posixpath
import struct
import zipfile
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch

_DTYPES = {  # torch's name of a storage's type
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64},
    **{"ComplexDoubleStorage": torch.complex128},
}
_NUMBERS = {  # NumPy's name of a number's type, and struct's
    **{"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b"},
    **{"u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B", "b1": "<?"},
}
# pickle's opcodes: that push what they carry, a constant, something new; that take so many values
_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_PUSHED |= {"BINBYTES", "SHORT_BINBYTES"}
_NEW = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
SCALARS = (str, int, float, bool, type(None))
_MOST_DIMENSIONS = 16  # of a tensor; RecBole's have four at most
_SHOWN = 100  # characters of what a file says, in a message


class Refused(Exception):
    """The name of what a checkpoint asks for and must not get."""


def shown(text: str) -> str:
    """A file's own words, for a message: short, on one line, no control characters."""
    return text[:_SHOWN].encode("unicode_escape").decode()


class _Function(NamedTuple):
    """What the pickle gets for a name: what runs here when it calls that."""

    run: Callable[..., object]


class SavedConfig:
    """RecBole's Config: its attributes."""

    state: object = None


class _Format(NamedTuple):
    """A NumPy dtype: struct's name of it."""

    name: str


class SavedStorage(NamedTuple):
    """The numbers that tensors look at, `[length]`, in the entry `data/KEY`."""

    key: str
    dtype: torch.dtype
    length: int


class SavedView(NamedTuple):
    """A tensor: a part of a storage that lies within it."""

    storage: SavedStorage
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _view(storage: object, offset: Any, size: Any, stride: Any, *rest: object) -> SavedView:
    """In the place of `torch._utils._rebuild_tensor_v2`; the rest is its gradient and hooks."""
    if not isinstance(storage, SavedStorage) or not len(size) == len(stride) <= _MOST_DIMENSIONS:
        raise UnpicklingError("a tensor of it is none")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise UnpicklingError("a tensor of it has no shape")
    last = sum((n - 1) * step for n, step in zip(size, stride)) if all(size) else -1
    # a view may not repeat its numbers either: one number could then fill the memory
    if offset + last >= storage.length or math.prod(size) > storage.length or len(rest) != 2:
        raise UnpicklingError("a tensor of it does not lie within its storage")
    return SavedView(storage, tuple(size), tuple(stride), offset)


def _dtype(name: object, *rest: object) -> _Format:
    """In the place of `numpy.dtype`: numbers only."""
    if not isinstance(name, str) or name not in _NUMBERS:
        raise Refused(f"numpy.dtype({shown(name) if isinstance(name, str) else ''})")
    return _Format(_NUMBERS[name])


def _number(form: object, data: Any) -> object:
    """In the place of NumPy's `scalar`."""
    if not isinstance(form, _Format):
        raise UnpicklingError("a number of it has no type")
    return struct.unpack(form.name, data)[0]


def _bytes(text: Any, encoding: object) -> bytes:
    """In the place of `_codecs.encode`, by which protocol 2 spells bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnpicklingError("bytes of it are none")
    return text.encode("latin1")


def _member(owner: object, name: object) -> object:
    """In the place of `getattr`, by which Python 3.11.2, Debian 12's, pickles an enum."""
    if owner is not _NAMED:
        raise Refused("builtins.getattr")
    return _NAMED


def _named(*args: object) -> object:
    """In the place of a class that does not matter; it also stands for its objects."""
    return _NAMED


def _path(*parts: object) -> str:
    """In the place of a path, which RecBole takes for a folder: its text."""
    if not all(isinstance(part, str) for part in parts):
        raise UnpicklingError("a path of it is none")
    return posixpath.join("", *map(str, parts))


_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_NAMED = _Function(_named)
_ALLOWED: Mapping[tuple[str, str], object] = {
    ("_codecs", "encode"): _Function(_bytes),
    ("__builtin__", "getattr"): _Function(_member),  # protocol 2
    ("builtins", "getattr"): _Function(_member),
    ("collections", "OrderedDict"): _Function(lambda: {}),
    ("numpy", "dtype"): _Function(_dtype),
    ("numpy.core.multiarray", "scalar"): _Function(_number),  # NumPy 1
    ("numpy._core.multiarray", "scalar"): _Function(_number),
    **{(m, n): _Function(_path) for m in ("pathlib", "pathlib._local") for n in _PATHS},
    ("recbole.config.configurator", "Config"): _Function(SavedConfig),
    ("recbole.utils.enum_type", "EvaluatorType"): _NAMED,
    ("recbole.utils.enum_type", "InputType"): _NAMED,
    ("recbole.utils.enum_type", "ModelType"): _NAMED,
    ("torch", "device"): _NAMED,
    **{("torch", name): name for name in _DTYPES},
    ("torch._utils", "_rebuild_parameter"): _Function(lambda tensor, needs_grad, hooks: tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_view),
    ("yaml.loader", "FullLoader"): _NAMED,
}


def _allowed(module: object, name: object) -> object:
    """The stand-in for a name; refuses one that is not on the list."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnpicklingError("its pickle asks for what has no name")
    if module.startswith("recbole.model.") or module == "cprec_recbole.models":
        return _NAMED
    if (module, name) not in _ALLOWED:
        raise Refused(shown(f"{module}.{name}"))
    return _ALLOWED[module, name]


def unpickled(pickled: bytes, entries: Mapping[str, zipfile.ZipInfo]) -> object:
    """What a pickle describes; its storages are entries of the zip."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # what was on the stack at each MARK
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case name if name in _PUSHED:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _NEW:
                stack.append(_NEW[name]())
            case name if name in _TAKEN:
                _gather(name, stack, [stack.pop() for _ in range(_TAKEN[name])][::-1])
            case "TUPLE" | "APPENDS" | "SETITEMS" as name:
                parts, stack = stack, below.pop()
                _gather(name, stack, parts)
            case "MARK":
                below.append(stack)
                stack = []
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GLOBAL":
                stack.append(_allowed(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_allowed(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, _Function):
                    raise UnpicklingError("its pickle calls what is no function")
                stack.append(function.run(*arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "BINPERSID":
                stack.append(_storage(stack.pop(), entries))
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case name:
                raise UnpicklingError(f"its pickle uses {name}")
    raise UnpicklingError("its pickle does not stop")


def _gather(name: str, stack: list[Any], parts: list[Any]) -> None:
    """Make a tuple of some values, or add them to the list or dict on top of the stack."""
    if name.startswith("TUPLE"):
        stack.append(tuple(parts))
    elif name.startswith("APPEND") and type(stack[-1]) is list:
        stack[-1].extend(parts)
    elif type(stack[-1]) is dict and all(type(key) in SCALARS for key in parts[::2]):
        stack[-1].update(zip(parts[::2], parts[1::2], strict=True))
    else:
        raise UnpicklingError("its pickle adds to what is no list or dict, or by an unusual key")


def _build(made: object, state: Any) -> None:
    """Give something its state: only a Config keeps it."""
    if isinstance(made, SavedConfig):
        made.state = state
    elif isinstance(made, _Format):
        if state[1] not in ("<", "|"):
            raise UnpicklingError("a number of it is not little-endian")
    elif type(made) is not dict:  # a state_dict's own state is the versions of its modules
        raise UnpicklingError("its pickle gives a state to what has none")


def _storage(pid: object, entries: Mapping[str, zipfile.ZipInfo]) -> SavedStorage:
    """The storage of a persistent id; its size is checked, its bytes are not read."""
    match pid:
        case ("storage", str(kind), str(key), str(), int(length)) if kind in _DTYPES:
            entry, dtype = entries.get(f"data/{key}"), _DTYPES[kind]
            if entry is not None and entry.file_size == length * dtype.itemsize:
                return SavedStorage(key, dtype, length)
    raise UnpicklingError("a storage of it is missing, or has another size than it should have")
