"""What a head keeps between searches: made from its weights, and dropped when they change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.settle import Weights
from cprec_recbole.strips import GroupedStrip, PlainStrip

_MAX_RANK = 32  # above it bounds skip too little to be worth a copy of the rows
_MIN_ROWS = 1024  # below it reading is quicker than looking at bounds
_SAMPLES = 32  # numbers of each parameter that are compared; see `_fingerprint`


class Snapshot:
    """Weights as a search reads them, and how to tell that they have changed since.

    Args:
        table: the factors.
        clusters: a tree's, `[n_blocks - 1, d]`; None for a flat softmax.
        indexed: whether to sort the tails' rows into groups with bounds. It takes a few seconds and
            about as much memory as the tails for a million items.

    Raises:
        CompressionError: weights that are not finite numbers.
    """

    def __init__(self, table: BlockEmbedding, clusters: Tensor | None, indexed: bool) -> None:
        self.indexed = indexed
        self._sources = [*table.parameters(), table.partition.item_at]
        self._sources += [] if clusters is None else [clusters]
        self._taken = _fingerprint(self._sources)
        dtype = table.blocks[0].weight.dtype
        dtype = dtype if dtype == torch.float64 else torch.float32
        blocks = zip(table.blocks, table.partition.starts)
        whole = [PlainStrip(block, start, dtype) for block, start in blocks]
        few = [not indexed or strip.n_items < _MIN_ROWS for strip in whole]
        strips = [
            strip if plain or strip.codes.shape[1] > _MAX_RANK else GroupedStrip(strip)
            for strip, plain in zip(whole, few)
        ]
        exact = None if clusters is None else clusters.detach().double()
        self.weights = Weights(table.partition, whole, exact, strips)

    def is_current(self, table: BlockEmbedding, clusters: Tensor | None) -> bool:
        """Whether the head still has the weights that this was made from."""
        sources = [*table.parameters(), table.partition.item_at]
        sources += [] if clusters is None else [clusters]
        same = len(sources) == len(self._sources)
        same = same and all(a is b for a, b in zip(sources, self._sources))
        return same and _fingerprint(sources) == self._taken


def _fingerprint(tensors: Sequence[Tensor]) -> list[object]:
    """What differs after a change: PyTorch counts changes in place, and a sample of the numbers
    shows most of those made through `.data`, which are not counted."""
    return [
        (
            tensor.data_ptr(),
            tensor.dtype,
            0 if tensor.is_inference() else tensor._version,
            tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLES)].tolist(),
        )
        for tensor in tensors
    ]
