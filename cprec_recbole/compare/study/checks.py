"""Whether RecBole takes what a study asks for, before anything is trained."""

from __future__ import annotations

from typing import Any

from cprec_recbole.compare.experiment import check_measurable
from cprec_recbole.compare.results import QUALITY, UNCOMPRESSED
from cprec_recbole.compare.study.recipes import recipe_without_ratio
from cprec_recbole.compare.study.spec import Spec
from cprec_recbole.compare.study.work import Bench
from cprec_recbole.config import CompressionError, reject_unknown
from cprec_recbole.host.library import known_options
from cprec_recbole.training.evaluation import check_metrics


def check(spec: Spec, data_path: str | None) -> None:
    """Whether RecBole takes what the study asks for, before anything is trained.

    Raises:
        CompressionError: a data set that is not there, an option that no model of the study has or
            that RecBole refuses, or options that do not measure NDCG@20.
    """
    bench = Bench(spec, None, data_path)
    plain = recipe_without_ratio(spec, UNCOMPRESSED)
    known: set[str] = set()
    for cell in dict.fromkeys(goal.cell for goal in spec.goals()):
        config = bench.config(cell, plain.options, spec.seeds[0], None)
        known.update(known_options(config))
        check_measurable(config)
        check_metrics(config, "metrics")
        _check_split(config)
        measured = [f"{m}@{k}".lower() for m in config["metrics"] for k in config["topk"]]
        if QUALITY not in measured:
            raise CompressionError(
                f"Expected `metrics` and `topk` to measure NDCG@20, but got {', '.join(measured)}."
            )
    reject_unknown(spec.options, sorted(known))


def _check_split(config: Any) -> None:
    """Raise a CompressionError where test users are not ranked over all items, or no data are left
    to choose the best epoch and learning rate by."""
    given = config["eval_args"]
    split, mode = given["split"], given["mode"]
    modes = set(mode.values()) if isinstance(mode, dict) else {mode}
    if modes != {"full"} or split.get("LS") != "valid_and_test":  # users are what is resampled
        raise CompressionError(
            "Expected `eval_args` to rank all items (mode: full) and to split off one item of each "
            f"user for each of validation and test (LS: valid_and_test), but got mode {mode} and "
            f"split {split}."
        )
    if given["order"] != "TO":
        raise CompressionError(
            f"Expected `eval_args` to go by time (order: TO), but got order {given['order']}."
        )
