"""What is exported: a whole recommendation, from item ids to item ids, as one plain graph."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cprec_recbole.int8.rows import SCALE_DTYPE, Int8Block
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.partition import PADDING


class Exportable(nn.Module):
    """A model's recommendation without branches that depend on its input.

    It scores all items and sorts; so it gives what `recommend` gives, equal scores by lower id.

    Args:
        small: a compressed model in float32; it is copied.
        k: how many items.
        block: what blocks in int8 become.
        sorts: whether all scores are sorted, as torch's `topk` does not keep equal ones in order;
            ONNX's TopK does.
    """

    def __init__(
        self, small: CompressedRecommender, k: int, block: type[PlainInt8Block], sorts: bool
    ) -> None:
        super().__init__()
        self.sorts = sorts
        known = (small.vocabulary, small.item_tokens, small.train_item_counts)
        self.model = copy.deepcopy(small, {id(each): each for each in known if each is not None})
        self.model.to("cpu").eval().requires_grad_(False)
        self.k = k
        for table in {id(t): t for t in (self.model.table, self.model.softmax.table)}.values():
            order = table.partition
            # the graph reads `position_of` alone, for look-ups and for scores in the order of ids;
            # of `item_at`, its inverse, an entry is left so that it is not written
            order.item_at = order.item_at[:1].clone()
            for own in table.blocks:
                if isinstance(own, Int8Block):
                    own.__class__ = block
                    own.scale = nn.Parameter(own.scale.to(SCALE_DTYPE), requires_grad=False)

    def forward(self, history: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        """The k best items of each history, and their scores.

        Args:
            history: item ids, oldest first, then zeros: of each history the newest `L` items,
                `[B, L]` with `L` the model's limit; at least one item each.
            exclude: item ids that must not be returned, 0 for none, `[B, M]`.

        Returns:
            Items `[B, k]`, int64, and scores `[B, k]`, float32; a score of -inf where fewer than k
            items are left.
        """
        scores = self.model.softmax.scores(self._hidden(history))
        padding = torch.zeros_like(history[:, :1])
        scores = scores.scatter(1, torch.cat([padding, exclude], dim=1), -torch.inf)
        if self.sorts:
            best, items = scores.sort(dim=1, descending=True, stable=True)
            return items[:, : self.k], best[:, : self.k]
        best, items = torch.topk(scores, self.k, dim=1)
        return items, best

    def _hidden(self, history: Tensor) -> Tensor:
        """Hidden state that predicts the next item, `[B, L] -> [B, d]`."""
        record, lengths = self.model.spec, (history != PADDING).sum(1)
        if record.hidden_states is None:
            return record.last_state(self.model.inner, history, lengths)
        states = self.model.hidden_states(history)
        if self.model.reads_last_column:
            return states[:, -1]
        last = (lengths - 1).clamp(min=0)
        return states.gather(1, last.view(-1, 1, 1).expand(-1, 1, states.shape[2])).squeeze(1)


class PlainInt8Block(Int8Block):
    """A block in int8 in plain operations: all of its rows become float at once, for a moment. Its
    scales are kept in bfloat16."""

    @property
    def dtype(self) -> torch.dtype:
        """See Block.dtype."""
        return torch.float32

    def logits(self, hidden: Tensor) -> Tensor:
        """See Block.logits."""
        return F.linear(self.into_rank(hidden), self._dequantized())

    def _dequantized(self) -> Tensor:
        return self.weight.to(torch.float32) * self.scale.to(torch.float32).unsqueeze(1)

    def _embed(self, rows: Tensor, padding: int | None) -> Tensor:
        scales = F.embedding(rows, self.scale.unsqueeze(1)).to(torch.float32)
        return F.embedding(rows, self.weight).to(torch.float32) * scales


class OnnxInt8Block(PlainInt8Block):
    """The same with ONNX's DequantizeLinear, which runtimes do not fold into float tables."""

    def _dequantized(self) -> Tensor:
        scale = self.scale.to(torch.float32)
        inputs = (self.weight, scale, torch.zeros_like(self.scale, dtype=torch.int8))
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            inputs,
            {"axis": 0},
            dtype=torch.float32,
            shape=self.weight.shape,
            version=13,
        )
