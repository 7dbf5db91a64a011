"""Which block each item is in, in as few bits as that takes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError


def packed_blocks(member: np.ndarray, n_blocks: int) -> Tensor:
    """The block of each item id in as few bits as they take, `[n_items] -> [bits, bytes]`."""
    planes = [np.packbits((member >> bit) & 1) for bit in range(_bits(n_blocks))]
    return torch.from_numpy(np.stack(planes) if planes else np.zeros((0, 0), dtype=np.uint8))


def unpacked_blocks(planes: Tensor, n_blocks: int, n_items: int) -> np.ndarray:
    """What `packed_blocks` packed, `[bits, bytes] -> [n_items]`.

    Raises:
        CompressionError: planes of another size.
    """
    expected = [_bits(n_blocks), -(-n_items // 8) if n_blocks > 1 else 0]
    if planes.dtype != torch.uint8 or list(planes.shape) != expected:
        raise CompressionError(
            f"Expected the weights' `blocks` to be {expected} bytes for {n_items} items, but got "
            f"{list(planes.shape)} of {planes.dtype}."
        )
    kind = np.dtype(np.uint8 if len(planes) <= 8 else np.int64)
    member = np.zeros(n_items, dtype=kind)
    for bit, plane in enumerate(planes.numpy()):
        np.bitwise_or(member, np.unpackbits(plane, count=n_items).astype(kind) << bit, out=member)
    return member


def _bits(n_blocks: int) -> int:
    return (n_blocks - 1).bit_length()
