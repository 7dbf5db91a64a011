"""RecBole's metrics of a model, without a score for every user and item at once."""

from __future__ import annotations

from typing import Any

import torch
from recbole.config import Config
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector, Evaluator
from recbole.evaluator.register import metrics_dict
from recbole.utils import EvaluatorType
from torch import Tensor, nn

from cprec_recbole.config import CompressionError
from cprec_recbole.host.numbering import check_numbering
from cprec_recbole.models.eval_mode import in_eval_mode
from cprec_recbole.models.recommender import CompressedRecommender

ROWS = 512  # users that are scored together
_SCORES = 2**24  # dense scores at a time, where a metric needs them: 64 MiB
_NEED_SCORES = ("rec.meanrank", "rec.score", "data.label")


class TopKCollector(Collector):
    """RecBole's collector, which can score a batch itself, a few rows at a time; a compressed model
    is asked for its best items only, unless a metric needs more (GAUC)."""

    def eval_batch_collect(
        self,
        scores_tensor: Tensor | nn.Module,
        interaction: Interaction,
        positive_u: Tensor,
        positive_i: Tensor,
        history: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Keep what the metrics need of a batch: of its scores, or of those of a model."""
        if isinstance(scores_tensor, Tensor):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return
        model: Any = scores_tensor
        device = next(model.parameters()).device
        interaction = interaction.to(device)
        positive_u, positive_i = positive_u.to(device), positive_i.to(device)
        by_lists = isinstance(model, CompressedRecommender) and history is None
        if by_lists and not any(self.register.need(what) for what in _NEED_SCORES):
            self._collect_lists(model, interaction, positive_u, positive_i)
            return
        size = max(1, min(ROWS, _SCORES // model.n_items))
        for start in range(0, len(interaction), size):
            rows = interaction[start : start + size]
            scores = model.full_sort_predict(rows).view(len(rows), -1)
            scores[:, 0] = -torch.inf
            if history is not None:
                scores[_of_rows(*history, start, size)] = -torch.inf
            pairs = _of_rows(positive_u, positive_i, start, size)
            super().eval_batch_collect(scores, rows, *pairs)

    def _collect_lists(
        self, model: Any, interaction: Interaction, users: Tensor, items: Tensor
    ) -> None:
        starts = range(0, len(interaction), ROWS)
        hidden = [model.last_hidden(interaction[start : start + ROWS]) for start in starts]
        best = model.softmax.topk(torch.cat(hidden), max(self.topk)).items
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", best)
        if self.register.need("rec.topk"):
            row = torch.arange(len(best), device=best.device).unsqueeze(1)
            hits = torch.isin(row * model.n_items + best, users * model.n_items + items)
            n_positive = torch.bincount(users, minlength=len(best)).unsqueeze(1)
            self.data_struct.update_tensor("rec.topk", torch.cat([hits, n_positive], 1).int())


def _of_rows(users: Tensor, items: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """The pairs of a user and an item of some rows, users counted from the first."""
    here = (users >= start) & (users < start + size)
    return users[here] - start, items[here]


@torch.no_grad()
def evaluate(model: nn.Module, data: Any) -> dict[str, float]:
    """RecBole's metrics of a model, by their names in lower case, e.g. `ndcg@20`.

    What `Trainer.evaluate` gives, without its files and logs. A compressed model is asked for its
    best items only, RecBole's own for every score, a few users at a time.

    Args:
        model: a compressed model, or RecBole's own sequential one.
        data: RecBole's validation or test data, full ranking; its config names the metrics.

    Raises:
        CompressionError: data of another kind.
    """
    check_evaluation_data(data, "data")
    check_numbering(model, data, "data")
    collector = TopKCollector(data.config)
    with in_eval_mode(model):
        for interaction, history, users, items in data:
            collector.eval_batch_collect(model, interaction, users, items, history)
    return plain(Evaluator(data.config).evaluate(collector.get_data_struct()))


def plain(result: Any) -> Any:
    """Metrics as Python's numbers, which not all of RecBole's are; None where there are none."""
    return result and {name: float(value) for name, value in result.items()}


def valid_metric(data: Any) -> str:
    """The name of the metric by which RecBole's options choose the best epoch, e.g. `ndcg@20`."""
    return str(data.config["valid_metric"]).lower()


def check_valid_metric(config: Config) -> None:
    """Raise a CompressionError where `valid_metric` is not among what is measured."""
    names = config["metrics"]
    measured = [f"{name}@{k}" for name in names if name.lower() != "gauc" for k in config["topk"]]
    measured += [name for name in names if name.lower() == "gauc"]  # of whole rankings
    if str(config["valid_metric"]).lower() not in [name.lower() for name in measured]:
        raise CompressionError(
            f"Expected `valid_metric` to be one of {', '.join(measured)} (by `metrics`, `topk`), "
            f"but got {config['valid_metric']}."
        )


def check_topk(config: Config, dataset: Any) -> None:
    """Raise a CompressionError where `topk` asks for more items than a RecBole data set has."""
    most, n_items = max(config["topk"]), int(dataset.item_num) - 1
    if config["eval_type"] == EvaluatorType.RANKING and most > n_items:
        raise CompressionError(
            f"Expected `topk` to be at most the {n_items} items of the data, but got {most}."
        )


def check_validation_data(data: Any) -> None:
    """As `check_evaluation_data`, for data by which the best epoch is chosen."""
    check_evaluation_data(data)
    check_valid_metric(data.config)


def check_evaluation_data(data: Any, argument: str = "valid_data") -> None:
    """Refuse what is not RecBole's evaluation data with full ranking."""
    if not isinstance(data, FullSortEvalDataLoader):
        raise CompressionError(
            f"Expected `{argument}` to be RecBole's evaluation data with full ranking, the second "
            f"or third of data_preparation(config, dataset), but got {type(data).__name__}."
        )
    if not len(data):
        raise CompressionError(
            f"Expected `{argument}` to hold rows to evaluate, but it has none: the split of "
            "`eval_args` leaves none out for it; choose one that does."
        )
    check_metrics(data.config, argument)


def check_metrics(config: Config, argument: str) -> None:
    """Raise a CompressionError for metrics that RecBole computes from the training data too."""
    needs = {name: metrics_dict[name.lower()].metric_need for name in config["metrics"]}
    needy = [name for name, need in needs.items() if any(n.startswith("data.") for n in need)]
    if needy:
        raise CompressionError(
            f"Expected the metrics in `{argument}` to be of users alone, as NDCG and Hit are, but "
            f"got {', '.join(needy)}, which RecBole computes from the training data too."
        )
