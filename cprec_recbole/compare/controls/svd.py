"""One truncated SVD of the trained table: no blocks, no training."""

from __future__ import annotations

from typing import Any, ClassVar

from cprec_recbole.compare.controls.choices import one_rank
from cprec_recbole.compare.controls.control import Derived, DerivedControl, Trained
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compress import compress
from cprec_recbole.config import CompressionConfig
from cprec_recbole.recover import LEARNING_RATE as RECOVERY_RATE
from cprec_recbole.recover import recover


class UniformSVD(DerivedControl):
    """The trained table at one rank for all items, layers shared as the compressed one's and fitted
    as `compress` fits them."""

    name = "uniform-svd"
    words = "a truncated SVD of the trained table, one rank for all items, no training after"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return one_rank(setting).as_dict()

    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        return Derived(compress(trained.model, _config(options), data=trained.train))


class UniformSVDRecovered(UniformSVD):
    """The same, then `recover` for at most a quarter of the epochs."""

    name = "uniform-svd-recovered"
    words = "uniform-svd, then recover() for at most a quarter of the epochs"
    searches_rate: ClassVar = True

    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        return recovered(super().derive(trained, options), trained)


def recovered(start: Derived, trained: Trained) -> Derived:
    """A model that was made of a trained one, after a recovery."""
    rate = trained.learning_rate
    found = recover(
        start.model,
        trained.model,
        trained.train,
        trained.budget,
        valid_data=trained.valid,
        seed=trained.seed,
        progress=False,
        learning_rate=RECOVERY_RATE if rate is None else rate,
    )
    return Derived(start.model, found)


def _config(options: dict[str, Any]) -> CompressionConfig:
    names = CompressionConfig.option_names()
    return CompressionConfig(**{name: options[name] for name in names if name in options})
