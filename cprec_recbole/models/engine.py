"""The layers of a model in onnxruntime, from histories to hidden states.

The graph holds the layers' weights. The table is an input: a session reads it where the model has
it, so that there is no second one.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.embedding import FEW_ITEMS, BlockEmbedding
from cprec_recbole.files import remove_leftovers, write_whole
from cprec_recbole.integers import Int4Rows, Int8Rows, unpacked
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.spec import Encoder
from cprec_recbole.partition import PADDING
from cprec_recbole.versions import Version

ENGINES = ("auto", "torch", "onnx")
_ROWS = 64  # of a batch that are run at a time: what lies between two steps stays in the cache
OPSET = 18  # of ONNX
_FORMAT = 2  # of the graphs; another one makes new ones
_MAKING = threading.RLock()  # PyTorch's exporter is for one at a time


class NoGraph(Exception):
    """Why the layers do not run in onnxruntime."""


class GraphLayers:
    """The layers of a CompressedRecommender as they are now, in a session of onnxruntime.

    Args:
        model: the model.
        kept: where the graph is kept for other processes, without its digest; None for nowhere.

    Raises:
        NoGraph: onnxruntime is missing, or the model is none that it can run.
    """

    def __init__(self, model: Any, kept: Path | None = None) -> None:
        _check(model)
        self.version, self._table = Version(model.inner), model.table
        with _MAKING:
            graph = _read(kept)
            try:
                if graph:
                    self._use(graph)
            except Exception:  # of whatever kind: it is made again
                graph = None
            if graph is None:
                graph = self._followed(model)
                _keep(kept, graph)
        if not graph:
            raise NoGraph("its layers cannot be followed")

    def _use(self, graph: bytes) -> None:
        self._session = _session_of(graph)
        inputs = {each.name: each for each in self._session.get_inputs()}
        self._any_width = not isinstance(inputs["item_seq"].shape[1], int)
        self._takes_lengths = "lengths" in inputs
        table = _table_inputs(self._table)  # the same numbers in this version
        self._arrays = {name: table[name].numpy() for name in table.keys() & inputs.keys()}

    def __call__(self, item_seq: Tensor, lengths: Tensor) -> Tensor:
        """See Encoder.last_state; of a batch as wide as the longest history may be."""
        items, ends = item_seq.numpy(), lengths.numpy()
        if len(items) <= _ROWS:
            return torch.from_numpy(self._run(items, ends))
        order = ends.argsort(kind="stable")  # rows of about one length: less padding is read
        places = [order[i : i + _ROWS] for i in range(0, len(items), _ROWS)]
        states = np.concatenate([self._run(items[rows], ends[rows]) for rows in places])
        return torch.from_numpy(states[order.argsort()])

    def _run(self, item_seq: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if self._any_width:
            item_seq = item_seq[:, : lengths.max()]
        given = {"item_seq": item_seq, **self._arrays}
        if self._takes_lengths:
            given["lengths"] = lengths
        return self._session.run(None, given)[0]

    def _followed(self, model: Any) -> bytes:
        """The graph, of any width if it can be, which is then in use; empty where there is none."""
        try:
            import onnx  # noqa: F401
        except ImportError as error:
            raise NoGraph(f"{error}") from error
        one_width = model.spec.hidden_states is None or model.reads_last_column
        for is_fixed in (True,) if one_width else (False, True):
            try:
                graph = _traced(model, is_fixed)
                self._use(graph)
                if self._agrees(model):
                    return graph
            except Exception:  # exporter and runtime raise many kinds
                continue
        return b""

    def _agrees(self, model: Any) -> bool:
        """Whether the graph does what the layers do, on histories that it was not made of."""
        most, generator = model.max_seq_length, torch.Generator().manual_seed(1)
        for lengths in ([most], [1], [max(1, most // 2)], [most, 1, max(1, most // 3), most - 1]):
            ends = torch.tensor(lengths).clamp(min=1)
            item_seq = _histories(model.n_items, most, ends, generator)
            with in_eval_mode(model), torch.no_grad():
                wanted = model(item_seq, ends)
            if not torch.allclose(self(item_seq, ends), wanted, rtol=1e-4, atol=1e-5):
                return False
        return True


def graph_file(folder: Path, checksum: str) -> Path:
    """Where the graph of a model in a folder is kept, without its digest: a name for each state of
    the folder, and for each version of what makes graphs."""
    facts = f"{checksum} {_FORMAT} {FEW_ITEMS} {torch.__version__}"
    return folder / f"layers-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def _read(kept: Path | None) -> bytes | None:
    """The graph that is kept; None where there is none, or none that is whole."""
    if kept is not None:
        with suppress(OSError):
            for path in kept.parent.glob(f"{kept.name}-*.onnx"):
                graph = path.read_bytes()
                if _with_digest(kept, graph) == path:
                    return graph
    return None


def _keep(kept: Path | None, graph: bytes) -> None:
    if kept is not None:
        path = _with_digest(kept, graph)
        with suppress(OSError):  # then each process makes its own
            write_whole(path, lambda part: part.write_bytes(graph))
            remove_leftovers(path)


def _with_digest(kept: Path, graph: bytes) -> Path:
    return kept.with_name(f"{kept.name}-{hashlib.sha256(graph).hexdigest()[:16]}.onnx")


def _check(model: Any) -> None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise NoGraph(f"{error}; pip install cprec_recbole[fast] brings it") from error
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            raise NoGraph(f"the model is on {parameter.device.type}, and not on the CPU")
        if parameter.dtype not in (torch.float32, torch.int8, torch.uint8):
            raise NoGraph(f"the model is in {parameter.dtype}, and not in float32, int8 or int4")


def _histories(
    n_items: int, width: int, lengths: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    items = torch.randint(1, n_items, (len(lengths), width), generator=generator)
    return items.masked_fill(torch.arange(width) >= lengths.unsqueeze(1), PADDING)


def _table_inputs(table: BlockEmbedding) -> dict[str, Tensor]:
    """What the graph reads of a table, by name."""
    if table.keeps_vectors:
        return {"vectors": table.kept_vectors()}
    inputs = {"position_of": table.partition.position_of}
    for j, block in enumerate(table.blocks):
        rows = block.rows()
        inputs[f"rows_{j}"] = rows.values if isinstance(rows, Int8Rows) else rows
        if isinstance(rows, Int8Rows):
            inputs[f"scales_{j}"] = rows.scales
    return inputs


class _GraphTable(nn.Module):
    """A table in the operations of a graph, on tensors that it is given."""

    given: dict[str, Tensor]

    def __init__(self, table: BlockEmbedding) -> None:
        super().__init__()
        self.partition = SimpleNamespace(n_items=table.partition.n_items)
        self._places = list(zip(table.partition.starts, table.partition.cutoffs))
        self._ranks, self._is_int4 = table.ranks, table.quantized == Int4Rows.dtype_name
        projections = (block.projection for block in table.blocks)
        self._projections = [None if p is None else p.detach().clone() for p in projections]

    def forward(self, items: Tensor) -> Tensor:
        """See BlockEmbedding.forward."""
        if "vectors" in self.given:
            return F.embedding(items, self.given["vectors"])
        positions = self.given["position_of"][items].long()
        parts = []
        for j, ((start, end), projection) in enumerate(zip(self._places, self._projections)):
            rows = (positions - start).clamp(0, end - start - 1)
            here = ((positions >= start) & (positions < end)).to(torch.float32).unsqueeze(-1)
            codes = self._codes(j, rows) * here
            parts.append(codes if projection is None else codes @ projection)
        return sum(parts[1:], parts[0])

    def _codes(self, j: int, rows: Tensor) -> Tensor:
        codes, scales = self.given[f"rows_{j}"][rows], self.given.get(f"scales_{j}")
        if scales is None:
            return codes
        if self._is_int4:
            return unpacked(codes, self._ranks[j]) * scales
        return codes.to(torch.float32) * scales[rows].unsqueeze(-1)


class _Graph(nn.Module):
    """What is traced: a model's layers, given its table."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self._names, self.table = names, _GraphTable(model.table)
        inner = copy.deepcopy(model.inner, {id(model.table): self.table})
        self.inner, self._encoder = inner, Encoder(model.spec, inner, model.reads_last_column)

    def forward(self, item_seq: Tensor, lengths: Tensor, *tensors: Tensor) -> Tensor:
        self.table.given = dict(zip(self._names, tensors))
        if self._encoder.reads_last_column:
            lengths = torch.full_like(lengths, item_seq.shape[1])
        return self._encoder.state_of(item_seq, lengths)


def _traced(model: Any, is_fixed: bool) -> bytes:
    """The graph of a model's layers, by what they do with some histories.

    PyTorch's older exporter: it needs `onnx` alone, takes a third of a second where the newer one
    takes ten, and knows ONNX's GRU. It follows nothing that depends on the inputs' numbers.
    """
    width, tensors = model.max_seq_length, _table_inputs(model.table)
    lengths, file = torch.tensor([width, 1]), io.BytesIO()
    sizes = {0: "batch"} if is_fixed else {0: "batch", 1: "length"}
    with quietly(), torch.no_grad():
        torch.onnx.export(
            _Graph(model, list(tensors)).eval().requires_grad_(False),
            (_histories(model.n_items, width, lengths), lengths, *tensors.values()),
            cast(Any, file),  # which it takes, though it does not say so
            dynamo=False,
            opset_version=OPSET,
            input_names=["item_seq", "lengths", *tensors],
            output_names=["hidden"],
            dynamic_axes={"item_seq": sizes, "lengths": {0: "batch"}},
        )
    return file.getvalue()


@contextmanager
def quietly() -> Iterator[None]:
    """Within: the exporters' progress and warnings about their own insides are not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _session_of(graph: bytes) -> Any:
    """A session on the CPU, with PyTorch's number of threads, which do not spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures are raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
