"""What is made of the trained table by an SVD: one rank for all items, or blocks in int8."""

from __future__ import annotations

from typing import Any, ClassVar

from cprec_recbole.compare.controls.choices import one_rank
from cprec_recbole.compare.controls.control import Derived, DerivedControl, Trained
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compress import compress
from cprec_recbole.config import CompressionConfig
from cprec_recbole.original import Original
from cprec_recbole.recover import LEARNING_RATE as RECOVERY_RATE
from cprec_recbole.recover import recover
from cprec_recbole.report import estimate


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


class RecoveredInt8(DerivedControl):
    """The trained model compressed with its rows in int8, to the bytes of the compressed one in
    float, then `recover` for at most a quarter of the epochs: four times the rank."""

    name = "recovered-int8"
    words = "the trained model compressed in int8 to the same bytes, then recover() likewise"
    searches_rate: ClassVar = True

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return setting.compression.as_dict()

    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        original, config = Original.of(trained.model), _config(options)
        sizes = estimate(original.record, original.host, config, original.n_items, original.dim)
        small = compress(
            trained.model,
            data=trained.train,
            size=sizes.sizes.total * original.table.element_size(),
            dtype="int8",
            softmax=config.softmax,
            tied=config.tied,
            verbose=False,
        )
        return recovered(Derived(small), trained)


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
