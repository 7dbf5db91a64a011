"""Where new items start: like others, or at the mean of the last block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models.vocabulary import Vocabulary


def similar_items(
    tokens: Sequence[str], like: Sequence[Any] | Mapping[str, Any] | None, known: Vocabulary
) -> list[list[int]]:
    """For each new token the ids of the items that it is like."""
    if isinstance(like, Mapping):
        strangers = [token for token in like if token not in tokens]
        if strangers:
            raise CompressionError(
                f"Expected `like` to name new tokens, but got {strangers[0]!r}, which is none."
            )
        like = [like.get(token) for token in tokens]
    if like is None:
        return [[] for _ in tokens]
    if isinstance(like, str) or not isinstance(like, Sequence) or len(like) != len(tokens):
        raise CompressionError(
            f"Expected `like` to have an entry for each of the {len(tokens)} new tokens, but got "
            f"{like!r}."
        )
    lists = [[] if entry is None else [entry] if not _is_list(entry) else entry for entry in like]
    return [known.ids(entry, name="`like`") for entry in lists]


def _is_list(entry: object) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str | bytes)


def new_rows(table: BlockEmbedding, models: Sequence[Sequence[int]]) -> Tensor:
    """A row of the last block for each new item, `[n, r]`."""
    skip = 1 if len(table.blocks) == 1 else 0  # of one block, row 0 is padding
    mean = table.blocks[-1].rows()[skip:].mean(0)
    return torch.stack([_codes(table, ids) if ids else mean for ids in models])


def _codes(table: BlockEmbedding, ids: Sequence[int]) -> Tensor:
    """The row of the last block whose vector is nearest to the mean of some items', `[r]`."""
    projection = table.blocks[-1].projection
    vector = table(torch.tensor(ids, device=table.blocks[0].weight.device)).mean(0)
    if projection is None:
        return vector
    solved = torch.linalg.lstsq(projection.T.double(), vector.double().unsqueeze(1)).solution
    return solved.squeeze(1).to(vector.dtype)
