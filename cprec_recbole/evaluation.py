"""Quality of a model on RecBole's evaluation data, without a trainer."""

from __future__ import annotations

from typing import Any

import torch
from recbole.config import Config
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.evaluator import Evaluator
from recbole.evaluator.register import metrics_dict
from recbole.utils import EvaluatorType
from torch import nn

from cprec_recbole.config import CompressionError
from cprec_recbole.modes import in_eval_mode
from cprec_recbole.recommender import CompressedRecommender
from cprec_recbole.saving.vocabulary import check_numbering
from cprec_recbole.training.collector import TopKCollector, look_up

ROWS = 512  # users that are scored together


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
    config = data.config
    collector = TopKCollector(config)
    device = next(model.parameters()).device
    with in_eval_mode(model):
        for interaction, history, positive_u, positive_i in data:
            if isinstance(model, CompressedRecommender) and history is None:
                scores = look_up(model, interaction.to(device))
                collector.eval_batch_collect(scores, interaction, positive_u, positive_i)
                continue
            for start in range(0, len(interaction), ROWS):
                rows = interaction[start : start + ROWS]
                predict: Any = model.full_sort_predict
                scores = predict(rows.to(device)).view(len(rows), -1)
                scores[:, 0] = -torch.inf
                here = (positive_u >= start) & (positive_u < start + ROWS)
                if history is not None:
                    seen = (history[0] >= start) & (history[0] < start + ROWS)
                    scores[history[0][seen] - start, history[1][seen]] = -torch.inf
                collector.eval_batch_collect(
                    scores, rows, positive_u[here] - start, positive_i[here]
                )
    result = Evaluator(config).evaluate(collector.get_data_struct())
    return {name: float(value) for name, value in result.items()}


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


def check_cutoffs(config: Config, dataset: Any) -> None:
    """Raise a CompressionError where `topk` asks for more items than a RecBole data set has."""
    if config["eval_type"] != EvaluatorType.RANKING:
        return
    most, n_items = max(config["topk"]), int(dataset.item_num) - 1
    if most > n_items:
        raise CompressionError(
            f"Expected `topk` to be at most the {n_items} items of the data, but got {most}."
        )


def check_validation_data(data: Any) -> None:
    """As `check_evaluation_data`, for data by which the best epoch is chosen."""
    check_evaluation_data(data)
    check_valid_metric(data.config)


def check_evaluation_data(data: Any, argument: str = "valid_data") -> None:
    """Raise a CompressionError for what is not RecBole's evaluation data with full ranking.

    Args:
        data: what was given.
        argument: the name that it was given by.
    """
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
    """Raise a CompressionError for metrics that RecBole computes from the training data too.

    Args:
        config: RecBole's.
        argument: what the message says that they are of.
    """
    needy = [
        name
        for name in config["metrics"]
        if any(need.startswith("data.") for need in metrics_dict[name.lower()].metric_need)
    ]
    if needy:
        raise CompressionError(
            f"Expected the metrics in `{argument}` to be of users alone, as NDCG and Hit are, but "
            f"got {', '.join(needy)}, which RecBole computes from the training data too."
        )
