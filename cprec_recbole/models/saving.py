"""A model as a folder of three files: options and checksums, weights, item tokens.

    config.json                        what the model is, and which files belong to it
    weights-<checksum>.safetensors     every parameter once
    items-<checksum>.json              the token of each item id from 1 on

Nothing in them can run code. config.json is replaced last and in one step, and names the other two
by what is in them. So a crash at any moment leaves either the old model or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.embedding import Block, BlockEmbedding, Int8Block
from cprec_recbole.files import flush, held
from cprec_recbole.int8 import (
    SCALE_DTYPE,
    fill_from_int8,
    float_matrices,
    kept_scales,
    whole_numbers,
)
from cprec_recbole.models.registry import model_class_named
from cprec_recbole.models.spec import Parts
from cprec_recbole.models.vocabulary import Vocabulary
from cprec_recbole.partition import Partition

if TYPE_CHECKING:
    from cprec_recbole.models.recommender import CompressedRecommender

FORMAT = "cprec_recbole"
# 2: rows in int8, 3: other matrices too; what has neither is written as 1, as older readers know it
FORMAT_VERSION = 3
_CONFIG = "config.json"
_OURS = re.compile(r"(weights-[0-9a-f]{16}\.safetensors|items-[0-9a-f]{16}\.json|\.cprec-.*\.tmp)")
_SUFFIXES = {"weights": ".safetensors", "items": ".json"}
# the parts of a model in files, as version 0.1 called them
_NAMES_IN_FILES = {"inner.": "backbone.", "softmax.": "head."}


def name_in_file(name: str) -> str:
    """What a parameter is called in a file."""
    for ours, theirs in _NAMES_IN_FILES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def name_in_model(name: str) -> str:
    """The reverse of `name_in_file`."""
    for ours, theirs in _NAMES_IN_FILES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


# -- saving ----------------------------------------------------------------------------------------


def save_model(
    model: CompressedRecommender, folder: str | os.PathLike[str], vocabulary: Vocabulary
) -> Path:
    """Write a model; see `CompressedRecommender.save_pretrained`."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CompressionError(
                f"Expected a model with finite weights, but {name} has NaN or inf."
            )
    weights, is_rounded = _weights_of(model)
    plan = {"ranks": list(model.table.ranks), "cutoffs": list(model.table.partition.cutoffs)}
    options = {
        "model": type(model).__name__,
        "n_items": model.n_items,
        "dtype": str(model.table.dtype).removeprefix("torch."),
        **({"rows": "int8"} if model.table.is_int8 else {}),
        **({"matrices": "int8"} if is_rounded else {}),
        "reads_last_column": model.reads_last_column,
        "compression": model.compression.as_dict() | plan,
        "architecture": model.spec.architecture_of(model.inner),
    }
    out = _as_path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with held(out, "folder"):
            _write(out, options, weights, vocabulary)
    except (OSError, SafetensorError) as error:
        raise CompressionError(
            f"Expected `folder` to be one that can be written, but got {out}: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from error
    return out


def _weights_of(model: CompressedRecommender) -> tuple[dict[str, Tensor], bool]:
    """What is written of the parameters, by name, and whether matrices of layers are in int8.

    Rows are in the order of item ids, with the block of each item beside them.
    """
    partition = model.table.partition
    member = partition.blocks(partition.position_of)
    weights = {"blocks": packed_blocks(member.cpu().numpy(), len(partition.sizes))}
    rounded = {}
    for name, matrix in float_matrices(model):
        values = whole_numbers(matrix, model.int8_scales.get(name))
        if values is not None:
            weights[name_in_file(name)], rounded[name] = values, model.int8_scales[name]
    orders, scales = _orders_by_id(model.tables)
    for name, parameter in model.named_parameters():
        if name in rounded:
            continue
        order = orders.get(id(parameter))
        kept = parameter if order is None else parameter[order]
        # scales have no more bits than that
        weights[name_in_file(name)] = kept.to(SCALE_DTYPE) if id(parameter) in scales else kept
    weights |= {name_in_file(name): buffer for name, buffer in _layer_buffers(model).items()}
    if rounded:
        weights["scales"] = kept_scales(list(rounded.values()))
    return weights, bool(rounded)


def _orders_by_id(tables: list[BlockEmbedding]) -> tuple[dict[int, Tensor], set[int]]:
    """For each parameter with an entry a row, the order that brings its rows into that of item
    ids; and which of those parameters are scales. By their `id`."""
    orders: dict[int, Tensor] = {}
    scales = set()
    for table in tables:
        partition = table.partition
        for block, start, end in zip(table.blocks, partition.starts, partition.cutoffs):
            order = torch.argsort(partition.item_at[start:end])
            orders |= {id(parameter): order for parameter in block.per_row()}
            if isinstance(block, Int8Block):
                scales.add(id(block.scale))
    return orders, scales


def _layer_buffers(model: CompressedRecommender) -> dict[str, Tensor]:
    """What the layers keep beside their parameters, such as running means, by name."""
    of_tables = {id(b) for part in (model.table, model.softmax) for b in part.buffers()}
    kept = model.state_dict()
    return {n: b for n, b in model.named_buffers() if n in kept and id(b) not in of_tables}


def packed_blocks(member: np.ndarray, n_blocks: int) -> Tensor:
    """The block of each item id as bits, lowest first, `[n_items] -> [n_bits, n_bytes]`."""
    planes = [np.packbits((member >> bit) & 1) for bit in range((n_blocks - 1).bit_length())]
    return torch.from_numpy(np.stack(planes)) if planes else torch.zeros(0, 0, dtype=torch.uint8)


def _write(
    out: Path, options: Mapping[str, Any], weights: Mapping[str, Tensor], vocabulary: Vocabulary
) -> None:
    def write_weights(path: Path) -> None:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(plain, path)

    def write_tokens(path: Path) -> None:
        text = json.dumps(vocabulary.tokens, ensure_ascii=False, separators=(",", ":"))
        path.write_text(text, encoding="utf-8")

    temporary = out / f".cprec-config-{os.getpid()}.tmp"
    try:
        files = {"weights": _put(out, "weights", write_weights)}
        files["items"] = _put(out, "items", write_tokens)
        version = 3 if "matrices" in options else 2 if "rows" in options else 1
        header = {"format": FORMAT, "format_version": version, **options, "files": files}
        header["checksum"] = _checksum(header)
        temporary.write_text(json.dumps(header, indent=1, ensure_ascii=False), encoding="utf-8")
        flush(temporary)
        os.replace(temporary, out / _CONFIG)
        flush(out)
    finally:  # a disk that is full gets back what a failure wrote
        _remove_unused(out)


def _put(out: Path, kind: str, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Write a file under the name of its own contents; returns its entry in config.json."""
    temporary = out / f".cprec-{kind}-{os.getpid()}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors lets nobody else read
        write(temporary)
        temporary.chmod(mode)
        flush(temporary)
        digest, size = _digest(temporary), temporary.stat().st_size
        name = f"{kind}-{digest[:16]}{_SUFFIXES[kind]}"
        os.replace(temporary, out / name)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": name, "bytes": size, "sha256": digest}


def _remove_unused(out: Path) -> None:
    """Remove files of ours that config.json does not name, unless it cannot be read."""
    used: set[str] = set()
    if (out / _CONFIG).exists():
        try:
            used = {entry["name"] for entry in _read_config(out)["files"].values()}
        except CompressionError:
            return
    for path in out.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of a model's files in its folder."""
    names = [_CONFIG, *(entry["name"] for entry in _read_config(folder)["files"].values())]
    return sum((folder / name).stat().st_size for name in names)


# -- loading ---------------------------------------------------------------------------------------


def load_pretrained(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> CompressedRecommender:
    """Load a model that `save_pretrained` wrote; no data set and no RecBole configuration needed.

    Args:
        folder: what `save_pretrained` was given.
        device: where the model shall be.

    Returns:
        The model in eval mode, with the scores, item ids and tokens that it was saved with.

    Raises:
        CompressionError: no model, one of a newer format, or files that are missing, cut short,
            changed, or do not belong together; the message says which.
    """
    header, weights, tokens = read_folder(folder)
    try:
        model = _built(header, weights)
        model.vocabulary = tokens
        _fill(model, weights, header.get("matrices"))
    except CompressionError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise CompressionError(
            f"Expected the files of {os.fspath(folder)} to belong together, but they do not: "
            f"{type(error).__name__}: {error}"
        ) from error
    if tokens is not None and len(tokens) != model.n_items - 1:
        raise CompressionError(
            f"Expected {model.n_items - 1} tokens in {os.fspath(folder)}, but got {len(tokens)}."
        )
    return model.to(device).eval()


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
            before, header = header, _read_config(out)
            if header == before:
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
    weights = {name_in_model(name): tensor for name, tensor in weights.items()}
    if "items" not in paths:
        return weights, None
    try:
        tokens = json.loads(paths["items"].read_text(encoding="utf-8"))
        if not isinstance(tokens, list):
            raise ValueError("it is no list")
        return weights, Vocabulary(tokens)
    except CompressionError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise CompressionError(f"Expected {paths['items']} to be JSON: {error}.") from error


class _Options(dict[str, Any]):
    """Options as RecBole's models read them: one that is not there is None."""

    def __missing__(self, name: str) -> None:
        return None


class _Catalogue:
    """As much of a dataset as a RecBole model's constructor asks for."""

    def __init__(self, iid_field: str) -> None:
        self.iid_field = iid_field

    def num(self, field: str) -> int:
        return 1


def _built(header: dict[str, Any], weights: dict[str, Tensor]) -> CompressedRecommender:
    """The model that the options describe, its weights not filled in."""
    model_class = model_class_named(header["model"])
    spec = model_class.spec
    compression = CompressionConfig.from_options(header["compression"])
    options = _Options(block_num=1, device="cpu", **header["architecture"])
    n_items = int(header["n_items"])
    plan = compression.plan(spec.dim(options[spec.size_option]), n_items)
    member = unpacked_blocks(weights["blocks"], len(plan.ranks), n_items)
    sizes = np.bincount(member, minlength=len(plan.ranks))
    if tuple(sizes) != plan.sizes:
        raise CompressionError(
            f"Expected blocks of {list(plan.sizes)} items, but the weights have {sizes.tolist()}."
        )
    item_at = torch.from_numpy(np.argsort(member, kind="stable").astype(np.int32))
    kind = {None: Block, "int8": Int8Block}.get(header.get("rows"))
    if kind is None:
        raise CompressionError(
            f"Expected `rows` to be int8 or left out, but got {header.get('rows')!r}."
        )
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and written over
        partition = Partition(item_at, plan.cutoffs)
        tables = [
            BlockEmbedding(partition, plan.ranks, plan.dim, kind)
            for _ in range(1 if compression.tied else 2)
        ]
        inner = spec.build_inner(options, _Catalogue(options["ITEM_ID_FIELD"]))
        inner.n_items = n_items
        parts = Parts(inner, tables[0], tables[-1], compression, bool(header["reads_last_column"]))
        model = model_class(parts=parts)
    return model.to(getattr(torch, header["dtype"]))


def unpacked_blocks(planes: Tensor, n_blocks: int, n_items: int) -> np.ndarray:
    """The block of each item id, `[n_items]`; a CompressionError for planes of another size."""
    expected = [(n_blocks - 1).bit_length(), -(-n_items // 8) if n_blocks > 1 else 0]
    if planes.dtype != torch.uint8 or list(planes.shape) != expected:
        raise CompressionError(
            f"Expected the weights' `blocks` to be {expected} bytes for {n_items} items, but got "
            f"{list(planes.shape)} of {planes.dtype}."
        )
    member = np.zeros(n_items, dtype=np.int16)
    for bit, plane in enumerate(planes.numpy()):
        member |= np.unpackbits(plane, count=n_items).astype(np.int16) << bit
    return member


@torch.no_grad()
def _fill(model: CompressedRecommender, weights: dict[str, Tensor], matrices: object) -> None:
    if matrices not in (None, "int8"):
        raise CompressionError(f"Expected `matrices` to be int8 or left out, but got {matrices!r}.")
    places = {**dict(model.named_parameters()), **_layer_buffers(model)}
    names = set(weights) - ({"blocks", "scales"} if matrices else {"blocks"})
    if names != set(places):
        missing, strange = sorted(set(places) - names), sorted(names - set(places))
        raise CompressionError(
            "Expected the weights to be those of the options, but they lack "
            f"{', '.join(missing) or 'nothing'} and have {', '.join(strange) or 'nothing'} besides."
        )
    scales = _scales(model, weights) if matrices else {}
    filled = {}
    for name, place in places.items():
        value = weights[name]
        if place.shape != value.shape:
            raise CompressionError(
                f"Expected the weight {name} to be {list(place.shape)} by the options, but it is "
                f"{list(value.shape)}."
            )
        if name in scales:
            filled[name] = fill_from_int8(place, value, scales[name])
            continue
        if place.is_floating_point() != value.is_floating_point():
            raise CompressionError(
                f"Expected the weight {name} to be {place.dtype} by the options, but it is "
                f"{value.dtype}."
            )
        place.copy_(value)
    model.int8_scales = filled


def _scales(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scales of each matrix that was kept in int8."""
    rounded = {n: p for n, p in float_matrices(model) if weights[n].dtype == torch.int8}
    return dict(zip(rounded, weights["scales"].split([len(p) for p in rounded.values()])))


# -- files -----------------------------------------------------------------------------------------


def _as_path(folder: str | os.PathLike[str]) -> Path:
    usable = isinstance(folder, str | os.PathLike) and os.fspath(folder) != ""
    if not usable or "\0" in str(folder):
        raise CompressionError(f"Expected `folder` to be a path, but got {folder!r}.")
    return Path(folder)


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
