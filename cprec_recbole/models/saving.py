"""A model as a folder: options and checksums, weights, item tokens.

    config.json                        what the model is, and which files belong to it
    weights-<checksum>.safetensors     every parameter once
    items-<checksum>.json              the token of each item id from 1 on
    layers-<...>.onnx                  the layers for onnxruntime, once they were asked for

Nothing in them can run code. config.json is replaced last and in one step, and names the other two
by what is in them. So a crash at any moment leaves either the old model or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.embedding import Block, BlockEmbedding, QuantizedBlock
from cprec_recbole.files import flush, held, write_whole
from cprec_recbole.integers import (
    ROWS_OF,
    SCALE_DTYPE,
    dtypes_of,
    fill,
    float_matrices,
    whole_numbers,
)
from cprec_recbole.models.engine import graph_file
from cprec_recbole.models.spec import Parts
from cprec_recbole.models.vocabulary import Vocabulary
from cprec_recbole.partition import Partition

FORMAT = "cprec_recbole"
# 2: rows in int8, 3: other matrices too, 4: int4; what has none is written as 1, for older readers
FORMAT_VERSION = 4
_CONFIG = "config.json"
_BETWEEN = re.compile(rb'[^\\]","')  # two tokens: quotation marks within one are escaped
_OURS = re.compile(
    r"(weights|items)-[0-9a-f]{16}\.(safetensors|json)|layers-[0-9a-f]{16}-[0-9a-f]{16}\.onnx|"
    r"\.(cprec|config\.json|layers)-.*\.tmp"
)


def save_model(model: Any, folder: str | os.PathLike[str], vocabulary: Vocabulary) -> Path:
    """Write a model; see `CompressedRecommender.save_pretrained`."""
    check_finite("model", model)
    out, table, weights = as_path("folder", folder), model.table, _kept_weights(model)
    is_rounded = "scales" in weights
    plan = {"ranks": list(table.ranks), "cutoffs": list(table.partition.cutoffs)}
    options = model.compression.as_dict() | plan
    if not model.compression.negatives:  # the folder is one that version 0.1 reads
        del options["negatives"], options["negatives_power"]
    if not model.compression.rounding:
        del options["rounding"]
    header = {
        "format": FORMAT,
        "format_version": _format_version(table.quantized, is_rounded),
        "model": type(model).__name__,
        "n_items": model.n_items,
        "dtype": str(table.dtype).removeprefix("torch."),
        **({"rows": table.quantized} if table.quantized else {}),
        **({"matrices": dtypes_of(model.quantized)[1]} if is_rounded else {}),
        "reads_last_column": model.reads_last_column,
        "compression": options,
        "architecture": model.spec.architecture_of(model.inner),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with held(out, "folder"):
            try:
                _write(out, header, weights, vocabulary)
            finally:  # a disk that is full gets back what a failure wrote
                _remove_unused(out)
    except (OSError, SafetensorError) as error:
        raise CompressionError(
            f"Expected `folder` to be one that can be written, but got {out}: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from error
    return out


def _format_version(quantized: str | None, is_rounded: bool) -> int:
    if quantized == "int4":
        return 4
    return 3 if is_rounded else 2 if quantized else 1


def check_finite(name: str, model: nn.Module) -> None:
    """Refuse a model, given as `name`, with NaN or inf among its weights."""
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CompressionError(
                f"Expected `{name}` to have finite weights, but {parameter_name} has NaN or inf."
            )


def _kept_weights(model: Any) -> dict[str, Tensor]:
    """What is written, by name: each parameter once, rows in the order of item ids, and the block
    of each item beside them."""
    instead: dict[int, Tensor] = {}  # what is written in place of parameters, by their `id`
    for table in model.tables:
        partition = table.partition
        for block, items in zip(table.blocks, partition.item_at.split(partition.sizes)):
            order = torch.argsort(items)
            instead[id(block.weight)] = block.weight[order]
            if isinstance(block, QuantizedBlock):  # scales have no more bits than that
                instead[id(block.scale)] = block.rows().pick(order).scales.to(SCALE_DTYPE)
    scales = []
    for name, matrix in float_matrices(model):
        values = whole_numbers(matrix, model.matrix_scales.get(name), model.quantized)
        if values is not None:
            instead[id(matrix)] = values
            scales.append(model.matrix_scales[name])
    member = partition.blocks(partition.position_of).cpu().numpy()
    weights = {name: instead.get(id(place), place) for name, place in _places(model).items()}
    weights["blocks"] = packed_blocks(member, len(partition.sizes))
    if scales:  # in as few bits as they have
        weights["scales"] = torch.cat([each.to("cpu", SCALE_DTYPE) for each in scales])
    return weights


def _places(model: Any) -> dict[str, Tensor]:
    """What is kept of a model, by name: its parameters, and what layers keep beside them, such as
    running means."""
    kept, parameters = model.state_dict(), dict(model.named_parameters())
    buffers = {n: b for n, b in model.named_buffers() if n in kept}
    return parameters | {n: b for n, b in buffers.items() if not n.endswith("partition.item_at")}


def packed_blocks(member: np.ndarray, n_blocks: int) -> Tensor:
    """The block of each item id as bits, lowest first, `[n_items] -> [n_bits, n_bytes]`."""
    planes = [np.packbits((member >> bit) & 1) for bit in range((n_blocks - 1).bit_length())]
    return torch.from_numpy(np.stack(planes)) if planes else torch.zeros(0, 0, dtype=torch.uint8)


def _write(
    out: Path, header: dict[str, Any], weights: Mapping[str, Tensor], vocabulary: Vocabulary
) -> None:
    theirs = {"inner": "backbone", "softmax": "head"}
    plain = {_renamed(n, theirs): t.detach().cpu().contiguous() for n, t in weights.items()}
    save = partial(safetensors.torch.save_file, plain)
    files = {
        "weights": _put(out, "weights", ".safetensors", save),
        "items": _put(out, "items", ".json", lambda path: write_tokens(vocabulary, path)),
    }
    header = {**header, "files": files}
    header["checksum"] = _checksum(header)
    text = json.dumps(header, indent=1, ensure_ascii=False)
    write_whole(out / _CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def write_tokens(vocabulary: Vocabulary, path: Path) -> None:
    """Write the tokens as a JSON list, with id 1 first."""
    text = json.dumps(vocabulary.tokens, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text, encoding="utf-8")


def _put(out: Path, kind: str, suffix: str, write: Callable[[Path], None]) -> dict[str, Any]:
    """Write a file under the name of its own contents; returns its entry in config.json."""
    temporary = out / f".cprec-{kind}-{os.getpid()}.tmp"
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask has it; safetensors lets nobody else read
    write(temporary)
    temporary.chmod(mode)
    flush(temporary)
    digest, size = _digest(temporary), temporary.stat().st_size
    name = f"{kind}-{digest[:16]}{suffix}"
    os.replace(temporary, out / name)
    return {"name": name, "bytes": size, "sha256": digest}


def _remove_unused(out: Path) -> None:
    """Remove files of ours that config.json does not name, unless it cannot be read."""
    try:
        entries = _read_config(out)["files"].values() if (out / _CONFIG).exists() else ()
    except CompressionError:
        return
    used = {entry["name"] for entry in entries}
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of a model's files in its folder."""
    names = [_CONFIG, *(entry["name"] for entry in _read_config(folder)["files"].values())]
    return sum((folder / name).stat().st_size for name in names)


# -- loading ---------------------------------------------------------------------------------------


def load_model(folder: str | os.PathLike[str], known: Mapping[str, type[Any]]) -> Any:
    """The model in a folder, out of the classes of compressed models by name; see
    `load_pretrained`."""
    try:
        header, weights, tokens = read_folder(folder)
        model = _built(header, weights, known)
        _fill(model, weights)
        if tokens is not None and len(tokens) != model.n_items - 1:
            raise ValueError(f"there are {len(tokens)} tokens for {model.n_items - 1} items")
    except CompressionError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise CompressionError(
            f"Expected the files of {os.fspath(folder)} to belong together, but they do not: "
            f"{reason}."
        ) from error
    model.vocabulary = tokens
    model.graph_file = graph_file(Path(folder).absolute(), _checksum(header))
    return model


def read_folder(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], Vocabulary | None]:
    """Options, weights and tokens of a folder; a CompressionError where it has no model, one of a
    newer format, or a file that is missing, cut short or changed."""
    out = as_path("folder", folder)
    header = _read_config(out)
    files = header["files"]
    try:
        tokens = None
        if "items" in files:
            tokens = Vocabulary(_tokens(_checked(out, files["items"]).read_bytes()))
        weights = safetensors.torch.load_file(_checked(out, files["weights"]))
    except (SafetensorError, OSError, RuntimeError, CompressionError) as error:
        if _read_config(out) != header:  # it was replaced while it was read
            return read_folder(folder)
        if isinstance(error, CompressionError):
            raise
        raise CompressionError(f"Expected the files of {out} to be readable: {error}.") from error
    return header, {name_in_model(name): tensor for name, tensor in weights.items()}, tokens


def _tokens(text: bytes) -> Iterator[str]:
    """The texts of a JSON list as `write_tokens` writes it, made a piece at a time: a million take
    70 MB."""
    start = 1
    while start < len(text):
        between = _BETWEEN.search(text, start + 2**16)
        end = between.start() + 2 if between else len(text) - 1
        yield from json.loads(b"[" + text[start:end] + b"]")
        start = end + 1


class _Options(dict[str, Any]):
    """Options as RecBole's models read them: one that is not there is None."""

    def __missing__(self, name: str) -> None:
        return None


def _built(
    header: dict[str, Any], weights: dict[str, Tensor], known: Mapping[str, type[Any]]
) -> Any:
    """The model that the options describe, its weights not filled in."""
    if header["model"] not in known:
        raise CompressionError(
            f"Expected `model` to be one of {', '.join(known)}, but got {header['model']!r}."
        )
    model_class = known[header["model"]]
    spec = model_class.spec
    compression = CompressionConfig.from_options(header["compression"])
    options = _Options(block_num=1, device="cpu", **header["architecture"])
    n_items = int(header["n_items"])
    plan = compression.plan(spec.dim(options[spec.size_option]), n_items)
    member = unpacked_blocks(weights.pop("blocks"), n_items)
    sizes = np.bincount(member, minlength=len(plan.ranks)).tolist()
    if sizes != list(plan.sizes):
        raise ValueError(f"the options have blocks of {list(plan.sizes)}, the weights of {sizes}")
    item_at = torch.from_numpy(np.argsort(member, kind="stable").astype(np.int32))
    kind = header.get("rows")
    make_block = partial(QuantizedBlock.empty, ROWS_OF[kind]) if kind else Block
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and written over
        partition = Partition(item_at, plan.cutoffs)
        n_tables = 1 if compression.tied else 2
        tables = [
            BlockEmbedding(partition, plan.ranks, plan.dim, make_block) for _ in range(n_tables)
        ]
        inner = spec.build_inner(options)
        inner.n_items = n_items
        parts = Parts(inner, tables[0], tables[-1], compression, bool(header["reads_last_column"]))
        model = model_class(parts=parts)
    is_mixed = (kind, header.get("matrices")) == ("int4", "int8")
    model.quantized = "mixed" if is_mixed else kind
    return model.to(getattr(torch, header["dtype"]))


def unpacked_blocks(planes: Tensor, n_items: int) -> np.ndarray:
    """The block of each item id, `[n_bits, n_bytes] -> [n_items]`."""
    member = np.zeros(n_items, dtype=np.int16)
    for bit, plane in enumerate(planes.numpy()):
        member |= np.unpackbits(plane, count=n_items).astype(np.int16) << bit
    return member


@torch.no_grad()
def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    places, scales = _places(model), weights.pop("scales", torch.empty(0))
    if weights.keys() != places.keys():
        missing, strange = (
            ", ".join(sorted(names)) or "nothing"
            for names in (places.keys() - weights.keys(), weights.keys() - places.keys())
        )
        raise ValueError(f"the weights lack {missing} and have {strange} besides")
    whole = torch.int8, torch.uint8
    rounded = {n: len(p) for n, p in float_matrices(model) if weights[n].dtype in whole}
    of_matrix = dict(zip(rounded, scales.split(list(rounded.values()))))
    for name, place in places.items():
        value = weights[name]
        is_float = name in of_matrix or value.is_floating_point()
        shape = place.shape
        if value.dtype == torch.uint8 and name in of_matrix:  # packed
            shape = torch.Size([len(place), -(-place[0].numel() // 2)])
        if shape != value.shape or place.is_floating_point() != is_float:
            raise ValueError(
                f"by the options the weight {name} is {place.dtype} of {list(place.shape)}, but it "
                f"is {value.dtype} of {list(value.shape)}"
            )
        if name in of_matrix:
            of_matrix[name] = fill(place, value, of_matrix[name])
        else:
            place.copy_(value)
    model.matrix_scales = of_matrix


# -- files -----------------------------------------------------------------------------------------


def as_path(name: str, value: object) -> Path:
    """The option `name` as a path; else a CompressionError."""
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise CompressionError(f"Expected `{name}` to be a path, but got {value!r}.")
    return Path(value)


def name_in_model(name: str) -> str:
    """What a parameter is called that has this name in a file: version 0.1's."""
    return _renamed(name, {"backbone": "inner", "head": "softmax"})


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    part, dot, rest = name.partition(".")
    return parts.get(part, part) + dot + rest


def _read_config(out: Path) -> dict[str, Any]:
    path, wanted = out / _CONFIG, "Expected `folder` to be one that save_pretrained wrote, but"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompressionError(
            f"{wanted} {path} is missing, cut short or damaged: {reason}."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CompressionError(f"{wanted} {path} is of something else.")
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CompressionError(
            f"Expected {path} to be of format {FORMAT_VERSION} or older, but got format {version}: "
            "it was written by a newer cprec_recbole; upgrade this one."
        )
    if header.pop("checksum", None) != _checksum(header):
        raise CompressionError(f"{wanted} {path} has been changed since; save the model again.")
    return header


def _checked(out: Path, entry: Mapping[str, Any]) -> Path:
    """A file that is what config.json says of it."""
    path = out / entry["name"]
    is_ours = _OURS.fullmatch(entry["name"])  # never a path that leads out of the folder
    size = path.stat().st_size if is_ours and path.is_file() else None
    if size is None:
        damage = "it is missing, or no file of ours"
    elif size != entry["bytes"]:
        how = "cut short" if size < entry["bytes"] else "longer than it was"
        damage = f"it is {how}: {size:,} bytes and not {entry['bytes']:,}"
    elif _digest(path) != entry["sha256"]:
        damage = "its bytes have been changed"
    else:
        return path
    raise CompressionError(f"Expected {path} to be as {_CONFIG} describes it, but {damage}.")


def _digest(path: Path) -> str:
    """A checksum of a file, a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _checksum(header: Mapping[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
