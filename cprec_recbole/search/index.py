"""What a head keeps between searches: made from its weights, and dropped when they change."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.search.settle import Weights
from cprec_recbole.search.strips import GroupedStrip, PlainStrip, Strip

_MAX_RANK = 32  # above it bounds skip too little to be worth a copy of the rows
_MIN_ROWS = 2**14  # below it reading is quicker than looking at bounds
_SAMPLES = 32  # numbers of each parameter that are compared; see `_Mark`


class Snapshot:
    """Weights as a search reads them, and how to tell that they have changed since.

    Args:
        table: the factors.
        tree: the head that has `clusters`, `[n_blocks - 1, d]`; None for a flat softmax.
        indexed: whether to sort the tails' rows into groups with bounds. It takes a few seconds and
            about as much memory as the tails for a million items.

    Raises:
        CompressionError: weights that are not finite numbers.
    """

    def __init__(self, table: BlockEmbedding, tree: nn.Module | None, indexed: bool) -> None:
        self.indexed = indexed
        self._parts = [table, table.partition, *table.blocks]
        owners = [*table.blocks, *([tree] if tree else [])]
        kept: list[tuple[Mapping[str, Tensor | None], str]] = [
            (owner._parameters, name) for owner in owners for name in owner._parameters
        ]
        kept.append((table.partition._buffers, "item_at"))
        self._marks = [_Mark(place, name) for place, name in kept if place[name] is not None]
        dtype = table.dtype
        dtype = dtype if dtype == torch.float64 else torch.float32
        blocks = zip(table.blocks, table.partition.starts)
        whole = [PlainStrip(block, start, dtype) for block, start in blocks]
        strips: list[Strip] = [
            GroupedStrip(strip) if indexed and _is_worth_it(strip) else strip for strip in whole
        ]
        clusters = tree._parameters["clusters"] if tree else None
        if indexed:  # what is read whole: the head, and a tree's blocks for their normalisers
            for strip in strips if tree else strips[:1]:
                strip.keep_columns = True
        exact = None if clusters is None else clusters.detach().double()
        self.weights = Weights(table.partition, whole, exact, strips)

    def is_current(self, table: BlockEmbedding) -> bool:
        """Whether the head still has the weights that this was made from."""
        parts = [table, table.partition, *table.blocks]
        same = len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))
        return same and all(mark.fits() for mark in self._marks)


class _Mark:
    """By what to tell that a tensor of a module changed: PyTorch counts changes in place, and a
    sample of its numbers shows most of those that it does not count, made through `.data` or by a
    fused optimizer (ours count theirs, see `optimizers`)."""

    def __init__(self, place: Mapping[str, Tensor | None], name: str) -> None:
        tensor = cast(Tensor, place[name])
        self._place, self._name, self._tensor = place, name, tensor
        self._address, self._version = tensor.data_ptr(), _version(tensor)
        self._sample = _look_at(tensor)

    def fits(self) -> bool:
        tensor = self._tensor
        return (
            self._place.get(self._name) is tensor
            and tensor.data_ptr() == self._address
            and _version(tensor) == self._version
            and self._sample.is_same()
        )


class _Bytes:
    """A few numbers of a tensor on the CPU, read where they lie: within a microsecond."""

    def __init__(self, tensor: Tensor) -> None:
        numbers = tensor.detach().view(-1, 1).view(torch.uint8).numpy()  # [n, bytes of each]
        self._window = numbers[:: max(1, len(numbers) // _SAMPLES)]  # shares its memory
        self._then = self._window.tobytes()

    def is_same(self) -> bool:
        return self._window.tobytes() == self._then


class _Numbers:
    """A few numbers of a tensor anywhere, for which a GPU is waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._then = tensor, self._read(tensor).clone()

    def is_same(self) -> bool:
        return torch.equal(self._read(self._tensor), self._then)

    @staticmethod
    def _read(tensor: Tensor) -> Tensor:
        numbers = tensor.detach().flatten()
        return numbers[:: max(1, len(numbers) // _SAMPLES)]


def _look_at(tensor: Tensor) -> _Bytes | _Numbers:
    in_place = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() > 0
    return _Bytes(tensor) if in_place else _Numbers(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _is_worth_it(strip: PlainStrip) -> bool:
    return strip.n_items >= _MIN_ROWS and strip.codes.shape[1] <= _MAX_RANK
