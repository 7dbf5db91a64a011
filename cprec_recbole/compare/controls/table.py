"""Item tables that are no blocks, the flat softmax over them, and the model around both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from cprec_recbole.config import CompressionError
from cprec_recbole.data.sequences import item_counts
from cprec_recbole.embedding import BlockEmbedding
from cprec_recbole.losses import LogitBlock
from cprec_recbole.models import MODELS
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.models.spec import Parts
from cprec_recbole.partition import PADDING, Partition
from cprec_recbole.search.exact import Found
from cprec_recbole.search.table import SearchTable
from cprec_recbole.search.topk import Ids, TopK, check_limits
from cprec_recbole.softmax import FullSoftmax

_SCORES = 2**24  # scores at a time: 64 MiB


class ItemTable(nn.Module, ABC):
    """Vectors of all items, kept in another way than as rows: `[n_items, d]` in id order.

    Stands where a BlockEmbedding stands. The padding item's vector is zero.

    Args:
        n_items: items of the catalogue, padding included.
        dim: size `d` of an item vector.
    """

    is_int8 = False  # which blocks in int8 are: a control says for itself what it trains

    def __init__(self, n_items: int, dim: int) -> None:
        super().__init__()
        self.partition = Partition(torch.arange(n_items), (n_items,))  # positions are ids
        self.partition.register_buffer("item_at", self.partition.item_at, persistent=False)
        self.dim = dim

    @property
    def n_items(self) -> int:
        """Items of the catalogue, padding included."""
        return self.partition.n_items

    @property
    def extra_bytes(self) -> int:
        """Bytes that scoring needs beside the parameters."""
        return 0

    @abstractmethod
    def vectors(self, items: Tensor) -> Tensor:
        """Vectors of item ids, `[...] -> [..., d]`; that of padding is not looked at."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Products with every item in id order, `[B, d] -> [B, n_items]`; that of padding is not
        looked at."""

    def forward(self, items: Tensor) -> Tensor:
        """Vectors of item ids, `[...] -> [..., d]`; IndexError outside the catalogue."""
        if items.numel() and (int(items.min()) < 0 or int(items.max()) >= self.n_items):
            raise IndexError(f"Expected item ids from 0 to {self.n_items - 1}.")
        return self.vectors(items).masked_fill((items == PADDING).unsqueeze(-1), 0.0)

    def dense(self) -> Tensor:
        """The whole table in id order, `[n_items, d]`."""
        return self(torch.arange(self.n_items, device=self.partition.item_at.device))

    def norm(self) -> Tensor:
        """Frobenius norm of the whole table, `[]`."""
        return torch.linalg.vector_norm(self.dense())


class FlatSoftmax(FullSoftmax):
    """One flat softmax over an ItemTable. Scores come from the table's own `logits`.

    The loss reads the vectors of all items, made for the step: the same values, and on a processor
    many times faster than sums of looked-up products with their gradients.
    """

    table: ItemTable  # type: ignore[assignment]

    def __init__(self, table: ItemTable, loss_memory: int) -> None:
        super().__init__(table, loss_memory)  # type: ignore[arg-type]

    def logit_blocks(self, hidden: Tensor) -> list[LogitBlock]:
        """See FullSoftmax.logit_blocks."""
        return [LogitBlock(hidden, self.table.dense())]

    @torch.no_grad()
    def search(
        self, hidden: Tensor, k: int, exclude: Ids | None = None, allowed: Ids | None = None
    ) -> Found:
        """See Softmax.search; dense scores, of which all are read."""
        n_items = self.table.partition.n_items
        limits = check_limits(len(hidden), k, exclude, allowed, self.table.partition)
        others = torch.zeros(n_items, dtype=torch.bool, device=hidden.device)
        if limits.allowed is not None:
            others = torch.ones_like(others)
            others[limits.allowed] = False
        others[PADDING] = True
        everyone = torch.arange(len(hidden), device=hidden.device)
        pieces = []
        for rows in everyone.split(max(1, _SCORES // n_items)):
            scores = self.scores(hidden[rows])
            scores[:, others] = -torch.inf
            scores[limits.of_rows(rows).pairs()] = -torch.inf
            pieces.append(_best(scores, limits.k))
        return Found(TopK(*(torch.cat(part) for part in zip(*pieces))), 1.0)

    def build_index(self) -> None:
        """Refused: an index is of blocks.

        Raises:
            CompressionError: always.
        """
        raise CompressionError(
            f"Expected a table of blocks to build an index, but got {type(self.table).__name__}."
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.table.logits(hidden)
        is_padding = torch.arange(logits.shape[1], device=logits.device) == PADDING
        return logits.masked_fill(is_padding, 0.0)

    def _current(self) -> SearchTable:
        raise NotImplementedError("scores are dense")


class TableRecommender(CompressedRecommender):
    """A Cp model whose table is an ItemTable: the base of those that `on_table` makes."""

    def _softmax_over(self, table: Any) -> FlatSoftmax:
        return FlatSoftmax(table, int(self.compression.loss_memory))

    def save_pretrained(self, folder: Any, tokens: Any = None) -> Any:
        """Refused: a control is there to be measured.

        Raises:
            CompressionError: always.
        """
        raise CompressionError(
            f"Expected a table of blocks to save, but got {type(self.table).__name__}; controls "
            "are not saved."
        )

    def add_items(self, tokens: Any, like: Any = None) -> list[int]:
        """Refused: a control is there to be measured.

        Raises:
            CompressionError: always.
        """
        raise CompressionError(
            f"Expected a table of blocks to add items to, but got {type(self.table).__name__}."
        )


_CLASSES: dict[type[CompressedRecommender], type[TableRecommender]] = {
    model: type(f"Table{model.spec.name}", (TableRecommender,), {"spec": model.spec})
    for model in MODELS
}


def on_table(config: Any, dataset: Any, table: ItemTable) -> TableRecommender:
    """A fresh model as RecBole would build it, on another kind of table.

    Args:
        config: a RecBole config of a Cp model; `sharing` and `training` are read.
        dataset: the training split.
        table: the item table.
    """
    model_class = _CLASSES[config.model_class]
    spec, compression = model_class.spec, compression_of(config)
    inner = spec.build_inner(config, dataset)
    inner.n_items = table.n_items
    blocks = cast(BlockEmbedding, table)
    last_column = spec.reads_last_column and compression.training == "last_position"
    parts = Parts(inner, blocks, blocks, compression, last_column, item_counts(dataset))
    model = model_class(parts=parts)
    model.item_tokens = dataset.field2id_token[dataset.iid_field]
    return model.to(config["device"])


def _best(scores: Tensor, k: int) -> TopK:
    """The k best columns of each row, equal scores by lower column."""
    least = scores.topk(k, dim=1).values[:, -1:]
    rows, items = (scores >= least).nonzero(as_tuple=True)  # by row, then by item; k or more a row
    values = scores[rows, items]
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    counts = torch.bincount(rows, minlength=len(scores))
    first = counts.cumsum(0) - counts
    picked = order[first.unsqueeze(1) + torch.arange(k, device=scores.device)]
    return TopK(items[picked], values[picked])
