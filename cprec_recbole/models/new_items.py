"""New items: they start like others, or at the mean of the last block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cprec_recbole.config import CompressionError
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.models.vocabulary import Vocabulary


def append_items(
    model: Any, tokens: Sequence[str], like: Sequence[Any] | Mapping[str, Any] | None
) -> list[int]:
    """See `CompressedRecommender.add_items`."""
    vocabulary: Vocabulary = model.known_vocabulary()
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
        raise CompressionError(
            f"Expected `tokens` to be a list of one token or more, but got {tokens!r}."
        )
    extended = vocabulary.extended(tokens)
    similar = _similar_items(tokens, like, vocabulary)
    rows = [_new_rows(table, similar) for table in model.tables]  # all that can fail has been done
    ids = list(range(model.n_items, model.n_items + len(tokens)))
    partition = model.table.partition.extended(len(tokens))
    for table, new in zip(model.tables, rows):
        table.partition = partition
        table.blocks[-1].extend(new)
    model.n_items = model.inner.n_items = partition.n_items
    if model.train_item_counts is not None:
        model.train_item_counts = np.append(model.train_item_counts, np.zeros(len(tokens)))
    plan = {"ranks": model.table.ranks, "cutoffs": partition.cutoffs}
    model.compression = replace(model.compression, **plan)
    model.vocabulary, model.item_tokens = extended, None
    model.softmax.drop_index()
    return ids


def _similar_items(
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
        like = [None] * len(tokens)
    if isinstance(like, str) or not isinstance(like, Sequence) or len(like) != len(tokens):
        raise CompressionError(
            f"Expected `like` to have an entry for each of the {len(tokens)} new tokens, but got "
            f"{like!r}."
        )
    lists = [[] if e is None else e if isinstance(e, list | tuple) else [e] for e in like]
    return [known.ids(entry, name="`like`") for entry in lists]


def _new_rows(table: BlockEmbedding, similar: Sequence[Sequence[int]]) -> Tensor:
    """A row of the last block for each new item, `[n, r]`."""
    skip = 1 if len(table.blocks) == 1 else 0  # of one block, row 0 is padding
    mean = table.blocks[-1].rows()[skip:].mean(0)
    return torch.stack([_nearest_row(table, ids) if ids else mean for ids in similar])


def _nearest_row(table: BlockEmbedding, ids: Sequence[int]) -> Tensor:
    """The row of the last block whose vector is nearest to the mean of some items', `[r]`."""
    projection = table.blocks[-1].projection
    vector = table(torch.tensor(ids, device=table.blocks[0].weight.device)).mean(0)
    if projection is None:
        return vector
    solved = torch.linalg.lstsq(projection.T.double(), vector.double().unsqueeze(1)).solution
    return solved.squeeze(1).to(vector.dtype)
