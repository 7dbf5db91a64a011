"""export(): a model as an ONNX file or as one of torch.export, from item ids to the best items."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.config import CompressionError, check_choice
from cprec_recbole.costs import part_sizes, saved_bytes
from cprec_recbole.embedding import QuantizedBlock
from cprec_recbole.files import write_whole
from cprec_recbole.integers import SCALE_DTYPE, Int4Rows, Int8Rows
from cprec_recbole.models.engine import OPSET, quietly
from cprec_recbole.models.recommender import CompressedRecommender, copied
from cprec_recbole.models.saving import as_path, write_tokens
from cprec_recbole.partition import PADDING
from cprec_recbole.search.topk import check_k

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
_AXES = {"history": {0: "batch"}, "exclude": {0: "batch", 1: "excluded"}}  # that may differ
_LARGEST = 2**31 - 2**24  # an ONNX file is one protocol buffer, which ends at 2 GiB


def export(
    small: CompressedRecommender, path: str | os.PathLike[str], to: str = "onnx", k: int = 20
) -> Path:
    """Write a model as one graph that needs neither RecBole nor this package.

    Its inputs are `history [B, L]`, item ids, oldest first, then zeros, with L the model's
    `max_seq_length`: of longer histories the newest items; and `exclude [B, M]`, ids that must not
    be returned, 0 for none. Its outputs are `items [B, k]` and `scores [B, k]`, those of
    `recommend`: the graph scores every item and sorts. B and M, 1 or more, may differ from call to
    call. Ids are int64. Quantized rows stay so.

    The tokens of the items, where the model knows them, are written beside as a JSON list, with id
    1 first. Returns the file.

    Args:
        small: a compressed model, its numbers in float32, its rows in float32, int8 or int4.
        path: the file; its folder exists.
        to: `onnx` (opset 18; needs the extra `export`) or `torch` (a `.pt2` for
            `torch.export.load`).
        k: how many items the graph returns.

    Raises:
        CompressionError: an unknown format, k above the catalogue, another precision, a model too
            large for one file, a path that cannot be written, or ONNX's packages missing.
    """
    file = _checked(small, path, to, k)
    write = _write_onnx if to == "onnx" else _write_torch
    facts = {  # what a caller of the graph has to know, kept in the file
        "model": type(small).__name__,
        "max_length": str(small.max_seq_length),
        "n_items": str(small.n_items),
        "k": str(k),
    }
    try:
        with quietly(), torch.no_grad():
            program = _traced(small, k, to)
            if small.vocabulary is None and small.item_tokens is None:
                tokens_path(file).unlink(missing_ok=True)  # of another model
            else:  # first: a catalogue grows at its end
                vocabulary = small.known_vocabulary()
                write_whole(tokens_path(file), lambda part: write_tokens(vocabulary, part))
            write_whole(file, lambda part: write(program, part, facts))
    except OSError as error:
        raise CompressionError(
            f"Expected `path` to be a file that can be written, but got {file}: "
            f"{error.strerror or error}."
        ) from error
    return file


def tokens_path(file: Path) -> Path:
    """Where the tokens of an exported model are: `small.onnx` has `small.items.json`."""
    stem = file.stem if file.suffix in SUFFIXES.values() else file.name
    return file.with_name(f"{stem}.items.json")


def _checked(small: Any, path: Any, to: str, k: int) -> Path:
    check_choice("to", to, tuple(SUFFIXES))
    if not isinstance(small, CompressedRecommender):
        raise CompressionError(
            f"Expected `small` to be a compressed model, but got {type(small).__name__}; compress "
            "it first, with CompressionConfig.uncompressed() to lose nothing."
        )
    check_k(k, small.n_items - 1)
    if small.table.dtype != torch.float32:
        raise CompressionError(
            f"Expected `small` to be in float32, but got {small.table.dtype}; use small.float()."
        )
    if to == "onnx":
        n_bytes = saved_bytes(small) + 4 * (small.n_items + part_sizes(small).layers)  # at most
        if n_bytes > _LARGEST:
            raise CompressionError(
                "Expected `small` to fit one ONNX file, which ends at 2 GiB, but it has "
                f'{n_bytes:,} bytes; use quantize(small) or to="torch".'
            )
        _check_packages()
    file = as_path("path", path)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise CompressionError(
            f"Expected `path` to be a file in a folder that can be written, but got {file}."
        )
    return file


def _check_packages() -> None:
    try:
        import onnx_ir.passes.common  # noqa: F401
        import onnxscript.optimizer  # noqa: F401

        torch.onnx.ops.symbolic  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise CompressionError(
            f"Expected onnx, onnxscript and torch 2.8 or newer for ONNX, but got: {error}; pip "
            'install ".[export]" in a clone of cprec_recbole brings them.'
        ) from error


class _Exported(nn.Module):
    """A copy of a model that recommends without branches that depend on its input: it scores all
    items and sorts, equal scores by lower id."""

    def __init__(self, small: CompressedRecommender, k: int, to_onnx: bool) -> None:
        super().__init__()
        self.k, self.to_onnx = k, to_onnx
        self.model = copied(small).to("cpu").eval().requires_grad_(False)
        for table in self.model.tables:
            # the graph reads `position_of` alone, for look-ups and for scores in the order of ids;
            # of `item_at`, its inverse, an entry is left so that it is not written
            table.partition.item_at = table.partition.item_at[:1].clone()
            for j, block in enumerate(table.blocks):
                if isinstance(block, QuantizedBlock):
                    table.factors[j] = _ExportedBlock(block, to_onnx)

    def forward(self, history: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        """Items `[B, k]` and scores `[B, k]`, of inputs as `export` has them; a score of -inf where
        fewer than k items are left."""
        lengths = (history != PADDING).sum(1)
        if self.model.spec.hidden_states is None:
            hidden = self.model(history, lengths)
        else:  # `last_state` looks at lengths, which a graph does not know
            states = self.model.hidden_states(history)
            last = (lengths - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, states.shape[2])
            is_last = self.model.reads_last_column
            hidden = states[:, -1] if is_last else states.gather(1, last).squeeze(1)
        scores = self.model.softmax.scores(hidden)
        never = torch.cat([torch.zeros_like(history[:, :1]), exclude], dim=1)  # padding neither
        scores = scores.scatter(1, never, -torch.inf)
        if self.to_onnx:  # its TopK keeps equal scores in order, torch's does not
            best, items = torch.topk(scores, self.k, dim=1)
        else:
            best, items = scores.sort(dim=1, descending=True, stable=True)
        return items[:, : self.k], best[:, : self.k]


class _ExportedBlock(QuantizedBlock):
    """A quantized block in plain operations: all of its rows become float at once, for a moment.
    Its scales are kept in bfloat16."""

    def __init__(self, block: QuantizedBlock, to_onnx: bool) -> None:
        super().__init__(block.rows().to(SCALE_DTYPE), block.projection)
        self.to_onnx = to_onnx

    def rows(self) -> Int8Rows:
        """See Block.rows."""
        return self._rows_type(self.weight, self.scale.to(torch.float32))

    def logits(self, hidden: Tensor) -> Tensor:
        """See Block.logits."""
        if not self.to_onnx or self._rows_type is Int4Rows:
            return F.linear(self.into_rank(hidden), self.whole())
        scales, shape = self.rows().scales, self.weight.shape
        inputs = self.weight, scales, torch.zeros_like(scales, dtype=torch.int8)
        rows = torch.onnx.ops.symbolic(  # runtimes do not fold this into a float table
            "DequantizeLinear", inputs, {"axis": 0}, dtype=scales.dtype, shape=shape, version=13
        )
        return F.linear(self.into_rank(hidden), rows)


def _traced(small: CompressedRecommender, k: int, to: str) -> Any:
    history = torch.zeros(3, small.max_seq_length, dtype=torch.int64)
    history[:, 0] = 1
    exclude = torch.zeros(3, 2, dtype=torch.int64)
    sizes = {name: torch.export.Dim(name) for name in ("batch", "excluded")}
    shapes = {name: {i: sizes[of] for i, of in axes.items()} for name, axes in _AXES.items()}
    model = _Exported(small, k, to == "onnx")
    try:
        return torch.export.export(model, (history, exclude), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises many kinds
        reason = str(error).strip().splitlines()[0]
        raise CompressionError(
            f"Expected `small` to be of a model that torch.export can follow, but "
            f"{small.spec.name} is none: {reason}"
        ) from error


def _write_torch(program: Any, part: Path, facts: dict[str, str]) -> None:
    kept = io.BytesIO()  # torch's writer ends the process where its file cannot be written
    torch.export.save(program, kept, extra_files={"cprec_recbole.json": json.dumps(facts)})
    part.write_bytes(kept.getbuffer())


def _write_onnx(program: Any, part: Path, facts: dict[str, str]) -> None:
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer

    result: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=("history", "exclude"),
        output_names=("items", "scores"),
        dynamic_shapes={name: dict(axes) for name, axes in _AXES.items()},  # their names
        optimize=False,
        verbose=False,
    )
    model = result.model
    passes.DeduplicateInitializersPass()(model)  # what is tied or shared is there once
    # positions and shapes are computed here, but nothing of a parameter, which would be there twice
    stored = set(model.graph.initializers.values())
    onnxscript.optimizer.optimize_ir(
        model, should_fold=lambda node: False if stored & set(node.inputs) else None
    )
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(facts)
    model.producer_name = "cprec_recbole"
    result.save(part)
