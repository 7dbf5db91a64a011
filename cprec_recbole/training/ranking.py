"""Quality user by user, and by how popular the item is that came next."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from cprec_recbole.config import CompressionError
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.training.evaluation import ROWS, check_evaluation_data

PARTS = ("head", "middle", "tail")  # of the catalogue, by popularity
_K = 20


class Ranking(NamedTuple):
    """What a model ranks first for the cases of evaluation data."""

    users: np.ndarray  # of each case, rising, [cases]
    targets: np.ndarray  # the item that came next, [cases]
    places: np.ndarray  # its place from 0, or 20 where it is not among the best 20, [cases]
    coverage: int  # how many distinct items are among the best 20 of all cases


@torch.no_grad()
def rank_targets(model: CompressedRecommender, data: Any) -> Ranking:
    """The ranking of RecBole's validation or test data. A CompressionError for data of another
    kind, or one that takes seen items out."""
    check_evaluation_data(data, "data")
    device = next(model.parameters()).device
    found: list[list[torch.Tensor]] = []
    is_shown = torch.zeros(model.n_items, dtype=torch.bool)
    with in_eval_mode(model):
        for batch, history, _, _ in data:
            if history is not None:
                raise CompressionError(
                    "Expected `repeatable` to be true, as it is for sequences by default, but got "
                    "false; users are not compared where seen items are taken out."
                )
            for start in range(0, len(batch), ROWS):
                rows = batch[start : start + ROWS]
                k = min(_K, model.n_items - 1)
                best = model.softmax.topk(model.last_hidden(rows.to(device)), k).items.cpu()
                is_shown[best] = True
                is_target = best == rows[model.ITEM_ID].unsqueeze(1)
                place = torch.where(is_target.any(1), is_target.int().argmax(1), _K)
                found.append([rows[model.USER_ID], rows[model.ITEM_ID], place])
    users, targets, places = (torch.cat(part).numpy() for part in zip(*found))
    order = np.argsort(users, kind="stable")
    return Ranking(users[order], targets[order], places[order], int(is_shown.sum()))


def gains(places: np.ndarray) -> np.ndarray:
    """NDCG@20 of each case, `[cases]`: `1 / log2(2 + place)`, since one item is relevant."""
    return np.where(places < _K, 1 / np.log2(2.0 + places), 0.0)


def by_user(users: np.ndarray, places: np.ndarray) -> np.ndarray:
    """NDCG@20 of every test user by rising id, the mean over a user's cases, `[users]`."""
    _, index = np.unique(users, return_inverse=True)
    return np.bincount(index, gains(places)) / np.bincount(index)


def by_popularity(targets: np.ndarray, places: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """NDCG@20, HR@20 and number of cases by part of the catalogue, out of the items that came next
    and their places, `[cases]`, and how often items occur in training, `[n_items]`."""
    part, found = popularity_parts(counts)[targets], {}
    for number, name in enumerate(PARTS):
        here = places[part == number]
        found[name] = {
            "ndcg@20": float(gains(here).mean()) if len(here) else None,
            "hit@20": float((here < _K).mean()) if len(here) else None,
            "cases": len(here),
        }
    return found


def popularity_parts(counts: np.ndarray) -> np.ndarray:
    """The part of each item id, 0 head, 1 middle, 2 tail, `[n_items]`: by falling training count,
    ties by lower id, which third of the training interactions its first one falls into; items that
    never occurred are in the tail."""
    counts = np.asarray(counts, dtype=np.float64)
    order = np.argsort(-counts[1:], kind="stable") + 1
    before = np.cumsum(counts[order]) - counts[order]
    part = np.full(len(counts), 2)
    part[order] = np.minimum(2, before * 3 // max(counts[1:].sum(), 1.0))
    part[counts == 0] = 2
    return part
