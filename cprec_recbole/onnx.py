"""Modules as ONNX graphs, and sessions of onnxruntime that run them."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OPSET = 18


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


@torch.no_grad()
def traced_graph(
    module: nn.Module, inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]
) -> bytes:
    """A module in eval mode, not used by anybody else meanwhile, as a graph with one output; of
    inputs by name, in the order of its arguments, of which some sizes may differ from call to call.

    PyTorch's older exporter: it needs `onnx` alone, takes a third of a second where the newer one
    takes ten, and knows ONNX's GRU. It follows nothing that depends on the inputs' numbers: whoever
    calls this compares the graph with the module on other inputs.
    """
    file: Any = io.BytesIO()  # which it takes, though it does not say so
    with quietly():
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["hidden"],
            dynamic_axes={name: dict(sizes) for name, sizes in axes.items()},
        )
    return file.getvalue()


def session_of(graph: bytes) -> Any:
    """An onnxruntime session on the CPU, with PyTorch's number of threads, which do not spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures are raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
