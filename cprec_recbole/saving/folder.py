"""A model as a folder of three files: options and checksums, weights, item tokens.

    config.json                        what the model is, and which files belong to it
    weights-<checksum>.safetensors     every parameter once
    items-<checksum>.json              the token of each item id from 1 on

Nothing in them can run code. config.json is replaced last and in one step, and names the other two
by what is in them; so a crash at any moment leaves either the old model or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.files import flush, held
from cprec_recbole.saving.vocabulary import Vocabulary

FORMAT = "cprec_recbole"
# 2: rows in int8, 3: other matrices too; what has neither is written as 1, as older readers know it
FORMAT_VERSION = 3
_CONFIG = "config.json"
_OURS = re.compile(r"(weights-[0-9a-f]{16}\.safetensors|items-[0-9a-f]{16}\.json|\.cprec-.*\.tmp)")
_PIECE = 2**16  # bytes of tokens that are read at a time
# between two texts of a list in JSON: the first quotation mark ends a text, for it has neither a
# backslash before it, as one inside has, nor what comes before one that begins a text
_BETWEEN = re.compile(rb'(?<![\\,\[])","')
_KINDS = {"weights": ".safetensors", "items": ".json"}


def write_folder(
    folder: str | os.PathLike[str],
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokens: Sequence[str] | None,
) -> Path:
    """Write a model; what was in the folder stays valid until the last step, and whoever reads it
    meanwhile gets the old model or the new one.

    Args:
        folder: made where it is missing; other files in it are left alone.
        options: what the model is, as plain values.
        weights: tensors by name, none sharing memory with another.
        tokens: the token of each item id from 1 on; None for a model that knows none.

    Raises:
        CompressionError: a folder that cannot be written, or that another process writes to.
    """
    out = _as_path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with held(out, "folder"):
            _write(out, options, weights, tokens)
    except (OSError, SafetensorError) as error:
        raise CompressionError(
            f"Expected `folder` to be one that can be written, but got {out}: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from error
    return out


def _write(
    out: Path, options: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Any
) -> None:
    files: dict[str, Any] = {}
    temporary = out / f".cprec-config-{os.getpid()}.tmp"
    try:
        files["weights"] = _put(out, "weights", lambda p: _save_weights(weights, p))
        if tokens is not None:
            text = json.dumps(list(tokens), ensure_ascii=False, separators=(",", ":"))
            files["items"] = _put(out, "items", lambda p: p.write_text(text, encoding="utf-8"))
        version = 3 if "matrices" in options else 2 if "rows" in options else 1
        header = {"format": FORMAT, "format_version": version, **options, "files": files}
        header["checksum"] = _checksum(header)
        temporary.write_text(json.dumps(header, indent=1, ensure_ascii=False), encoding="utf-8")
        flush(temporary)
        os.replace(temporary, out / _CONFIG)
        flush(out)
    finally:  # a disk that is full gets back what a failure wrote
        _remove_unused(out)


def read_folder(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], Vocabulary | None]:
    """Options, weights and tokens of a folder, every file checked against its checksum.

    Raises:
        CompressionError: no model, one of a newer format, or a file that is missing, cut short or
            changed; the message says which.
    """
    out = _as_path(folder)
    header = _read_config(out)
    while True:
        try:
            return header, *_contents(out, header)
        except CompressionError:
            found = header
            header = _read_config(out)
            if header == found:
                raise
            # else it was replaced while it was read


def _contents(out: Path, header: Mapping[str, Any]) -> tuple[dict[str, Tensor], Vocabulary | None]:
    """Weights and tokens of the files that config.json names."""
    try:
        paths = {kind: _checked_file(out, kind, entry) for kind, entry in header["files"].items()}
    except OSError as error:
        raise CompressionError(f"Expected the files of {out} to be readable: {error}.") from error
    try:
        weights = safetensors.torch.load_file(paths["weights"])
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise CompressionError(f"Expected {paths['weights']} to hold weights: {error}.") from error
    if "items" not in paths:
        return weights, None
    try:
        return weights, _tokens(paths["items"])
    except CompressionError:
        raise
    except (ValueError, OSError) as error:
        raise CompressionError(f"Expected {paths['items']} to be JSON: {error}.") from error


def _tokens(path: Path) -> Vocabulary:
    """The tokens in a file, of which only a piece at a time is a list of texts."""
    text = path.read_bytes()
    if not (text.startswith(b"[") and text.endswith(b"]")):
        raise ValueError("it is no list")
    return Vocabulary(token for piece in _between(text) for token in json.loads(piece))


def _between(text: bytes) -> Iterator[bytes]:
    """A list of texts in JSON, as compact as we write it, as several lists."""
    start = 1
    while start < len(text):
        found = _BETWEEN.search(text, start + _PIECE)
        end = len(text) - 1 if found is None else found.start() + 1
        yield b"[" + text[start:end] + b"]"
        start = end + 1


def _as_path(folder: str | os.PathLike[str]) -> Path:
    usable = isinstance(folder, str | os.PathLike) and os.fspath(folder) != ""
    if not usable or "\0" in str(folder):
        raise CompressionError(f"Expected `folder` to be a path, but got {folder!r}.")
    return Path(folder)


def _put(out: Path, kind: str, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Write a file under the name of its own contents; returns its entry in config.json."""
    temporary = out / f".cprec-{kind}-{os.getpid()}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors lets nobody else read
        write(temporary)
        temporary.chmod(mode)
        flush(temporary)
        digest = _digest(temporary)
        size = temporary.stat().st_size
        name = f"{kind}-{digest[:16]}{_KINDS[kind]}"
        os.replace(temporary, out / name)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": name, "bytes": size, "sha256": digest}


def _save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(plain, path)


def _read_config(out: Path) -> dict[str, Any]:
    path = out / _CONFIG
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressionError(
            f"Expected `folder` to be one that save_pretrained wrote, but {path} cannot be read: "
            f"{error.strerror or error}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CompressionError(
            f"Expected {path} to be whole, but it is cut short or damaged: {error}."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CompressionError(
            f"Expected {path} to be of a model that save_pretrained wrote, but it is of something "
            "else."
        )
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CompressionError(
            f"Expected {path} to be of format {FORMAT_VERSION} or older, but got format {version}: "
            "it was written by a newer cprec_recbole; upgrade this one."
        )
    if header.pop("checksum", None) != _checksum(header):
        raise CompressionError(
            f"Expected {path} to be as it was written, but it has been changed: its checksum does "
            "not fit. Save the model again."
        )
    return header


def _checked_file(out: Path, kind: str, entry: Mapping[str, Any]) -> Path:
    path = out / entry["name"]
    if not _OURS.fullmatch(entry["name"]):  # never a path that leads out of the folder
        raise CompressionError(f"Expected a name of our own in {_CONFIG}, but got {path.name!r}.")
    if not path.is_file():
        raise CompressionError(f"Expected {path} beside {_CONFIG}, but it is missing.")
    size = path.stat().st_size
    if size != entry["bytes"]:
        how = "cut short" if size < entry["bytes"] else "longer than it was"
        raise CompressionError(
            f"Expected {path} to have {entry['bytes']:,} bytes, but it has {size:,}: it is {how}."
        )
    if _digest(path) != entry["sha256"]:
        raise CompressionError(
            f"Expected {path} to be as it was written, but its bytes have been changed: the "
            f"checksum of the {kind} does not fit."
        )
    return path


def _checksum(header: Mapping[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _remove_unused(out: Path) -> None:
    """Remove files of ours that config.json does not name: those of models that were here before,
    or what is left of one that could not be written. Where it cannot be read all stay."""
    used: set[str] = set()
    if (out / _CONFIG).exists():
        try:
            used = {entry["name"] for entry in _read_config(out)["files"].values()}
        except CompressionError:
            return
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)


def size_of(folder: Path) -> int:
    """Bytes of a model's files in its folder."""
    names = [_CONFIG, *(entry["name"] for entry in _read_config(folder)["files"].values())]
    return sum((folder / name).stat().st_size for name in names)
