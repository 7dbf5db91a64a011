"""What a compressed model does outside RecBole: recommend, be kept in a folder, take new items."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cprec_recbole.backbones import Backbone, architecture
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.embedding import BlockEmbedding, Int8Block
from cprec_recbole.int8 import SCALE_DTYPE, float_matrices, kept_scales, whole_numbers
from cprec_recbole.item_tables import Host
from cprec_recbole.modes import can_be_trained, in_eval_mode
from cprec_recbole.partition import Partition
from cprec_recbole.saving.folder import write_folder
from cprec_recbole.saving.membership import packed_blocks
from cprec_recbole.saving.vocabulary import Vocabulary, as_vocabulary, check_numbering
from cprec_recbole.search.topk import TopK, check_k
from cprec_recbole.serving.growth import new_rows, similar_items
from cprec_recbole.serving.inputs import barred_ids, pad_histories
from cprec_recbole.softmax import SoftmaxHead


class TokenTopK(NamedTuple):
    """The best items of each history by their tokens.

    Attributes:
        tokens: `[B, k]`, best first.
        scores: `[B, k]`; log-probabilities with a tree softmax, logits with a full one.
    """

    tokens: list[list[str]]
    scores: Tensor


class Servable(nn.Module):
    """A compressed model's life without RecBole's data set; a base of CompressedRecommender."""

    record: ClassVar[Backbone]
    backbone: Host
    head: SoftmaxHead
    compression: CompressionConfig
    n_items: int
    max_seq_length: int
    reads_last_column: bool
    train_item_counts: np.ndarray | None
    item_tokens: np.ndarray | None
    vocabulary: Vocabulary | None
    int8_scales: Mapping[str, Tensor]

    if TYPE_CHECKING:

        @property
        def table(self) -> BlockEmbedding:
            """The item table."""

    @torch.no_grad()
    def recommend(
        self,
        item_seq: Tensor | Sequence[int] | Sequence[Sequence[int]],
        k: int = 20,
        exclude_seen: bool = False,
        exclude: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        allowed: Tensor | Sequence[int] | None = None,
    ) -> TopK:
        """The k best next items, exact, best first, equal scores by lower id.

        Args:
            item_seq: one history of item ids, oldest first, or several: a list of lists of any
                lengths, or a tensor `[B, L]` with 0 as padding. Of a history longer than the
                model's limit the newest items count.
            k: how many items.
            exclude_seen: leave out the items of the history itself, also those beyond the limit.
            exclude: item ids to leave out: one list for all histories, or one list for each.
            allowed: the only item ids to choose from; every item if left out.

        Returns:
            TopK: items `[B, k]` and their scores `[B, k]`; one history is a batch of one.

        Raises:
            CompressionError: an empty history, an id outside the catalogue, nothing allowed, or k
                above what may be recommended.
        """
        check_k(k, self.n_items - 1)
        device = self.table.partition.item_at.device
        histories, seen = pad_histories(item_seq, self.n_items, self.max_seq_length)
        seen_ids = seen if exclude_seen else None
        barred = barred_ids(exclude, len(histories), self.n_items, seen_ids)
        lengths = (histories != 0).sum(1)
        with in_eval_mode(self):
            hidden = self(histories.to(device), lengths.to(device))
            return self.head.topk(hidden, k, barred, allowed)

    def recommend_tokens(
        self,
        histories: Sequence[str | int] | Sequence[Sequence[str | int]],
        k: int = 20,
        *,
        unknown: str = "warn",
        exclude_seen: bool = False,
        exclude: Sequence[str | int] | None = None,
        allowed: Sequence[str | int] | None = None,
    ) -> TokenTopK:
        """The k best next items for histories of the catalogue's own tokens.

        Args:
            histories: one history of tokens, oldest first, or several.
            k: how many items.
            unknown: tokens that are not in the catalogue are left out with a warning (`warn`) or
                without (`skip`), or are an `error`.
            exclude_seen: leave out the items of the history itself.
            exclude: tokens to leave out for all histories.
            allowed: the only tokens to choose from.

        Raises:
            CompressionError: a model without tokens, an unknown token where that is an error, a
                history of which nothing is left, and as `recommend`.
        """
        vocabulary = self._vocabulary()
        if isinstance(histories, str | bytes) or not isinstance(histories, Sequence):
            raise CompressionError(
                f"Expected `histories` to be tokens or lists of them, but got {histories!r}."
            )
        several = any(isinstance(h, Sequence) and not isinstance(h, str) for h in histories)
        rows = list(histories) if several else [histories]
        ids = []
        for index, row in enumerate(rows):
            if not isinstance(row, Sequence) or isinstance(row, str | bytes):
                raise CompressionError(
                    f"Expected every history to be a list of tokens, but history "
                    f"{index} is {row!r}."
                )
            name = f"history {index}" if several else "the history"
            ids.append(vocabulary.ids(row, unknown, name))
            if not ids[-1]:
                raise CompressionError(
                    f"Expected every history to hold a token of the catalogue, but history {index} "
                    "has none."
                )
        barred = None if exclude is None else vocabulary.ids(exclude, unknown, "`exclude`")
        only = None if allowed is None else vocabulary.ids(allowed, unknown, "`allowed`")
        best = self.recommend(ids, k, exclude_seen, barred or None, only)
        return TokenTopK(
            [[vocabulary.token(i) for i in row] for row in best.items.tolist()], best.scores
        )

    def known_vocabulary(self) -> Vocabulary:
        """The tokens of the items.

        Raises:
            CompressionError: a model that knows none.
        """
        return self._vocabulary()

    def build_index(self) -> None:
        """Prepare `recommend` to skip most of a large catalogue; see SoftmaxHead.build_index."""
        self.head.build_index()

    def save_pretrained(self, folder: str | os.PathLike[str], tokens: Any = None) -> Path:
        """Keep the model in a folder that `load_pretrained` reads, without RecBole's data set.

        Weights as safetensors, each parameter once whatever shares it; options and tokens as JSON.
        A crash at any moment leaves what was in the folder before. Rows within a block are written
        by item id: their order means nothing.

        Args:
            folder: made where it is missing; a model that was in it is replaced.
            tokens: a RecBole dataset, or the token of each item id from 1 on; may be left out for a
                model that RecBole built.

        Returns:
            The folder.

        Raises:
            CompressionError: no tokens, tokens that do not fit, or a folder that cannot be written or
                that another process writes to.
        """
        check_numbering(self, tokens, "tokens")
        vocabulary = self._vocabulary(tokens)
        for name, parameter in self.named_parameters():
            if not torch.isfinite(parameter).all():
                raise CompressionError(
                    f"Expected a model with finite weights, but {name} has NaN or inf."
                )
        weights, is_rounded = self._kept_weights()
        partition = self.table.partition
        plan = {"ranks": list(self.table.ranks), "cutoffs": list(partition.cutoffs)}
        options = {
            "model": type(self).__name__,
            "n_items": self.n_items,
            "dtype": str(self.table.dtype).removeprefix("torch."),
            **({"rows": "int8"} if self.table.is_int8 else {}),
            **({"matrices": "int8"} if is_rounded else {}),
            "reads_last_column": self.reads_last_column,
            "compression": self.compression.as_dict() | plan,
            "architecture": architecture(self.record, self.backbone),
        }
        return write_folder(folder, options, weights, vocabulary.tokens)

    def _kept_weights(self) -> tuple[dict[str, Tensor], bool]:
        """What is written of the parameters, by name, and whether matrices of layers are in int8:
        rows in the order of ids, with the block of each item beside them."""
        partition = self.table.partition
        member = partition.blocks(partition.position_of)
        weights = {"blocks": packed_blocks(member.cpu().numpy(), len(partition.sizes))}
        rounded = {}
        for name, matrix in float_matrices(self):
            values = whole_numbers(matrix, self.int8_scales.get(name))
            if values is not None:
                weights[name], rounded[name] = values, self.int8_scales[name]
        by_id, scales = self._rows_by_id()
        for name, parameter in self.named_parameters():
            if name in rounded:
                continue
            order = by_id.get(id(parameter))
            weights[name] = parameter if order is None else parameter[order]
            if id(parameter) in scales:
                weights[name] = weights[name].to(SCALE_DTYPE)  # they have no more bits than that
        weights |= self.layer_buffers()
        if rounded:
            weights["scales"] = kept_scales(list(rounded.values()))
        return weights, bool(rounded)

    def layer_buffers(self) -> dict[str, Tensor]:
        """What the layers keep beside their parameters, such as running means, by name."""
        of_tables = {id(b) for table in (self.table, self.head) for b in table.buffers()}
        kept = self.state_dict()
        return {n: b for n, b in self.named_buffers() if n in kept and id(b) not in of_tables}

    def _rows_by_id(self) -> tuple[dict[int, Tensor], set[int]]:
        """For each parameter with an entry a row of a block, the order that brings its rows into
        that of item ids; and which of those are scales. By their `id`."""
        partition, tables = self.table.partition, (self.table, self.head.table)
        blocks = [
            (block, torch.argsort(partition.item_at[start:end]))
            for table in tables
            for block, start, end in zip(table.blocks, partition.starts, partition.cutoffs)
        ]
        by_id = {id(parameter): order for block, order in blocks for parameter in block.per_row()}
        return by_id, {id(block.scale) for block, _ in blocks if isinstance(block, Int8Block)}

    @can_be_trained
    @torch.no_grad()
    def add_items(
        self,
        tokens: Sequence[str],
        like: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Append items to the last block, in place; every other row stays as it is, bit for bit.

        A new item starts at the mean vector of the items that it is like, as near as the last
        block's rank allows, or else at the mean of the last block. Use the model at once, or train
        it further; an optimizer, an index and a teacher from before know nothing of the new rows.

        Args:
            tokens: of the new items.
            like: for each new item a token, or a list of tokens, of items that it is like, or None;
                as a list in the order of `tokens`, or by token.

        Returns:
            The ids of the new items.

        Raises:
            CompressionError: a token that is there already or comes twice, or like an unknown one.
        """
        vocabulary = self._vocabulary()
        if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
            raise CompressionError(
                f"Expected `tokens` to be a list of one token or more, but got {tokens!r}."
            )
        for token in Vocabulary(tokens).tokens:
            if token in vocabulary:
                raise CompressionError(
                    f"Expected `tokens` to be new, but {token!r} is in the catalogue already."
                )
        extended = vocabulary.extended(tokens)
        models = similar_items(tokens, like, vocabulary)
        tables = [self.table]
        if self.head.table is not self.table:
            tables.append(self.head.table)
        rows = [new_rows(table, models) for table in tables]  # all that can fail has been done
        partition = self._grow_partition(len(tokens))
        for table, new in zip(tables, rows):
            table.partition = partition
            table.blocks[-1].extend(new)
        first, self.n_items = self.n_items, self.n_items + len(tokens)
        self.backbone.n_items = self.n_items
        if self.train_item_counts is not None:
            self.train_item_counts = np.append(self.train_item_counts, np.zeros(len(tokens)))
        self.compression = replace(
            self.compression, ranks=self.table.ranks, cutoffs=partition.cutoffs
        )
        self.vocabulary, self.item_tokens = extended, None
        self.head.drop_index()
        return list(range(first, self.n_items))

    def _grow_partition(self, n_new: int) -> Partition:
        old = self.table.partition
        ids = torch.arange(self.n_items, self.n_items + n_new, device=old.item_at.device)
        item_at = torch.cat([old.item_at.long(), ids])
        return Partition(item_at, (*old.cutoffs[:-1], len(item_at))).to(old.item_at.device)

    def _vocabulary(self, tokens: Any = None) -> Vocabulary:
        if tokens is not None:
            return as_vocabulary(tokens, self.n_items)
        if self.vocabulary is None and self.item_tokens is not None:
            self.vocabulary = Vocabulary([str(token) for token in self.item_tokens[1:]])
        if self.vocabulary is None:
            raise CompressionError(
                "Expected a model that knows its items' tokens, but this one was not built by "
                "RecBole; set model.vocabulary = Vocabulary(tokens) or pass `tokens` to "
                "save_pretrained."
            )
        return as_vocabulary(self.vocabulary, self.n_items)
