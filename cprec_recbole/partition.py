"""Items ordered by popularity and cut into blocks (CpRec, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cprec_recbole.config import CompressionError

PADDING = 0  # RecBole's id for "no item"; always position 0, in the head


class Partition(nn.Module):
    """Where each item stands: its position in popularity order, and so its block and row.

    Position 0 is the padding item; positions 1, 2, ... are the items by falling count, ties by
    lower id. Block j holds the positions `cutoffs[j-1] <= p < cutoffs[j]`, row `p - cutoffs[j-1]`.

    Args:
        item_at: item id at each position, `[n_items]`; a permutation that starts with 0.
        cutoffs: end of each block, rising; the last is `n_items`.
    """

    item_at: Tensor
    position_of: Tensor
    inner_cutoffs: Tensor

    def __init__(self, item_at: Tensor, cutoffs: Sequence[int]) -> None:
        super().__init__()
        self.cutoffs = tuple(int(c) for c in cutoffs)
        if not self.cutoffs or any(b <= a for a, b in zip((1, *self.cutoffs), self.cutoffs)):
            raise CompressionError(f"Expected `cutoffs` to rise from 2, but got {cutoffs}.")
        if self.cutoffs[-1] != len(item_at):
            raise CompressionError(
                f"Expected `cutoffs` to end at the {len(item_at)} items, but got {cutoffs}."
            )
        # int32 keeps both small; only `item_at` is saved, the inverse follows from it
        self.register_buffer("item_at", item_at.to(torch.int32))
        self.register_buffer("position_of", _inverse(item_at), persistent=False)
        inner = torch.tensor(self.cutoffs[:-1], dtype=torch.int64)
        self.register_buffer("inner_cutoffs", inner, persistent=False)

    @classmethod
    def from_counts(cls, counts: np.ndarray, cutoffs: Sequence[int]) -> Partition:
        """Order items by how often they occur in training, `[n_items]`; that of id 0 is ignored."""
        often = np.asarray(counts, dtype=np.float64)[1:]  # unsigned numbers have no negative
        by_popularity = np.argsort(-often, kind="stable") + 1
        return cls(torch.from_numpy(np.concatenate([[PADDING], by_popularity])), cutoffs)

    def extended(self, n_new: int) -> Partition:
        """With new items at the end of the last block; their ids follow."""
        ids = torch.arange(self.n_items, self.n_items + n_new, device=self.item_at.device)
        item_at = torch.cat([self.item_at.long(), ids])
        return Partition(item_at, (*self.cutoffs[:-1], len(item_at))).to(item_at.device)

    @property
    def n_items(self) -> int:
        """Items of the catalogue, padding included."""
        return self.cutoffs[-1]

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of each block, `[n_blocks]`."""
        return (0, *self.cutoffs[:-1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each block, `[n_blocks]`; the head's include the padding row."""
        return tuple(end - start for start, end in zip(self.starts, self.cutoffs))

    def positions(self, items: Tensor) -> Tensor:
        """Position of each item id in popularity order, `[...] -> [...]`; IndexError outside."""
        return self.position_of.index_select(0, items.reshape(-1)).long().view(items.shape)

    def blocks(self, positions: Tensor) -> Tensor:
        """Block of each position, `[...] -> [...]`."""
        return torch.bucketize(positions, self.inner_cutoffs, right=True)

    def by_item(self, by_position: Tensor) -> Tensor:
        """Bring columns from popularity order into RecBole's id order, `[..., n_items]`."""
        return by_position.index_select(-1, self.position_of)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"n_items={self.n_items}, cutoffs={list(self.cutoffs)}"

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise a CompressionError where a state's order is none of this catalogue's items; one of
        another size is PyTorch's to refuse."""
        item_at = state_dict.get(f"{prefix}item_at")
        if isinstance(item_at, Tensor) and item_at.shape == self.item_at.shape:
            _inverse(item_at)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.position_of = _inverse(self.item_at)


def _inverse(item_at: Tensor) -> Tensor:
    """Position of each id, `[n_items]`; refuses what is not a permutation that starts with 0."""
    order = item_at.to(torch.int64)
    places = torch.arange(len(order), dtype=torch.int32, device=order.device)
    inverse = torch.full_like(places, -1)
    if ((order >= 0) & (order < len(order))).all():  # of a permutation every place is taken
        inverse.scatter_(0, order, places)
    if (inverse < 0).any() or order[:1].tolist() != [PADDING]:
        raise CompressionError(
            "Expected `item_at` to hold every item id once, the padding id 0 first, but it does "
            "not; the checkpoint or the order of items is damaged."
        )
    return inverse
