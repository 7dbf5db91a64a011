"""RecBole's collector of evaluation results, without a score for every user and item at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector
from torch import Tensor

from cprec_recbole.host.processes import COLLECTED
from cprec_recbole.recommender import CompressedRecommender

_ROWS = 512  # rows of a batch that go through the layers together
_SCORES = 2**24  # dense scores at a time, where a metric needs them: 64 MiB


class _Users(NamedTuple):
    """What the collector gets in place of `[B, n_items]` scores."""

    model: CompressedRecommender
    hidden: Tensor  # [B, d]


class TopKCollector(Collector):
    """RecBole's collector, which looks the best items up by `topk`.

    What it hands to the metrics is what RecBole's own does. Metrics that need more than the best
    items (GAUC) get dense scores, a few rows at a time.
    """

    n_rows: int | None = None  # how many of the evaluation's rows count; None for all
    register: Any
    data_struct: Any
    topk: list[int]

    def eval_batch_collect(
        self,
        scores_tensor: Tensor | _Users,
        interaction: Interaction,
        positive_u: Tensor,
        positive_i: Tensor,
    ) -> None:
        """Keep what the metrics need of a batch."""
        if not isinstance(scores_tensor, _Users):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return
        head, hidden = scores_tensor.model.head, scores_tensor.hidden
        positive_u, positive_i = positive_u.to(hidden.device), positive_i.to(hidden.device)
        if any(self.register.need(what) for what in ("rec.meanrank", "rec.score", "data.label")):
            size = max(1, _SCORES // scores_tensor.model.n_items)
            for start in range(0, len(hidden), size):
                scores = head.scores(hidden[start : start + size])
                scores[:, 0] = -torch.inf
                here = (positive_u >= start) & (positive_u < start + size)
                super().eval_batch_collect(
                    scores,
                    interaction[start : start + size],
                    positive_u[here] - start,
                    positive_i[here],
                )
            return
        best = head.topk(hidden, max(self.topk)).items
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", best)
        if self.register.need("rec.topk"):
            n_items = scores_tensor.model.n_items
            rows = torch.arange(len(best), device=best.device).unsqueeze(1)
            hits = torch.isin(rows * n_items + best, positive_u * n_items + positive_i)
            n_positive = torch.bincount(positive_u, minlength=len(best)).unsqueeze(1)
            self.data_struct.update_tensor("rec.topk", torch.cat([hits, n_positive], 1).int())

    def get_data_struct(self) -> Any:
        """What was kept; of several processes, of all their rows that count."""
        for name in COLLECTED:
            if self.n_rows is not None and name in self.data_struct:
                self.data_struct.set(name, self.data_struct.get(name)[: self.n_rows])
        return super().get_data_struct()


def look_up(model: CompressedRecommender, users: Interaction) -> _Users:
    """What the collector takes in place of scores: hidden states, through the layers in pieces."""
    hidden = [
        model.last_hidden(users[start : start + _ROWS]) for start in range(0, len(users), _ROWS)
    ]
    return _Users(model, torch.cat(hidden))
