"""Which block each item is in, in as few bits as that takes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError


def packed_blocks(member: np.ndarray, n_blocks: int) -> Tensor:
    """The block of each item id as bits, lowest first, `[n_items] -> [n_bits, n_bytes]`."""
    planes = [np.packbits((member >> bit) & 1) for bit in range((n_blocks - 1).bit_length())]
    return torch.from_numpy(np.stack(planes)) if planes else torch.zeros(0, 0, dtype=torch.uint8)


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
