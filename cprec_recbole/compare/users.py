"""Quality user by user, and by how popular the item is that came next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cprec_recbole.config import CompressionError
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import ROWS, check_evaluation_data

K = 20
PARTS = ("head", "middle", "tail")


@dataclass(frozen=True)
class Ranked:
    """Where the item that came next stands among all, for every test case.

    Attributes:
        users: user of each case, rising, `[cases]`.
        targets: the item that came next, `[cases]`.
        places: its place from 0, or `K` and above where it is not among the best K, `[cases]`.
    """

    users: np.ndarray
    targets: np.ndarray
    places: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """HR@20 of each case, `[cases]`."""
        return (self.places < K).astype(np.float64)

    @property
    def gains(self) -> np.ndarray:
        """NDCG@20 of each case, `[cases]`: one item is relevant, so that it is `1 / log2(2 +
        place)`."""
        return np.where(self.places < K, 1 / np.log2(2.0 + self.places), 0.0)

    def by_user(self) -> np.ndarray:
        """NDCG@20 of every test user by rising id, the mean over a user's cases, `[users]` of
        float32."""
        _, index = np.unique(self.users, return_inverse=True)
        return (np.bincount(index, self.gains) / np.bincount(index)).astype(np.float32)

    def by_popularity(self, counts: np.ndarray) -> dict[str, dict[str, float | int | None]]:
        """HR@20, NDCG@20 and number of cases by part of the catalogue (`popularity_parts`).

        Args:
            counts: training interactions of each item id, `[n_items]`.
        """
        part = popularity_parts(counts)[self.targets]
        found: dict[str, dict[str, float | int | None]] = {}
        for number, name in enumerate(PARTS):
            here = part == number
            cases = int(here.sum())
            found[name] = {
                "ndcg@20": float(self.gains[here].mean()) if cases else None,
                "hit@20": float(self.hits[here].mean()) if cases else None,
                "cases": cases,
            }
        return found


def popularity_parts(counts: np.ndarray) -> np.ndarray:
    """The part of each item id, 0 head, 1 middle, 2 tail, `[n_items]`.

    Items by falling training count, ties by lower id; the head are those that hold the first third
    of the training interactions, the middle those that hold the second, the tail all others. An
    item belongs where its first interaction falls; items that never occurred are in the tail.
    """
    counts = np.asarray(counts, dtype=np.float64)
    order = np.argsort(-counts[1:], kind="stable") + 1
    before = np.cumsum(counts[order]) - counts[order]
    part = np.full(len(counts), 2)
    part[order] = np.minimum(2, before * 3 // max(counts[1:].sum(), 1.0))
    part[counts == 0] = 2
    return part


@torch.no_grad()
def rank_targets(model: CompressedRecommender, data: Any) -> Ranked:
    """Rank what came next for every case of RecBole's evaluation data, all items ranked.

    Args:
        model: any Cp model or control.
        data: RecBole's validation or test data.

    Raises:
        CompressionError: data of another kind, or one that takes seen items out.
    """
    check_evaluation_data(data, "data")
    device = next(model.parameters()).device
    users, targets, places = [], [], []
    with in_eval_mode(model):
        for batch, history, _, _ in data:
            if history is not None:
                raise CompressionError(
                    "Expected `repeatable` to be true, as it is for sequences by default, but got "
                    "false; users are not compared where seen items are taken out."
                )
            for start in range(0, len(batch), ROWS):
                rows = batch[start : start + ROWS]
                k = min(K, model.n_items - 1)
                best = model.softmax.topk(model.last_hidden(rows.to(device)), k).items.cpu()
                target = rows[model.ITEM_ID]
                found = best == target.unsqueeze(1)
                place = torch.where(found.any(1), found.int().argmax(1), K)
                users.append(rows[model.USER_ID])
                targets.append(target)
                places.append(place)
    user = torch.cat(users).numpy()
    order = np.argsort(user, kind="stable")
    return Ranked(user[order], torch.cat(targets).numpy()[order], torch.cat(places).numpy()[order])
