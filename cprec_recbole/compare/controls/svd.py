"""One truncated SVD of the trained table: no blocks, no training."""

from __future__ import annotations

from typing import Any, ClassVar

from cprec_recbole.compare.controls.choices import chosen, one_rank
from cprec_recbole.compare.controls.control import Derived, DerivedControl, Trained
from cprec_recbole.compare.controls.recovered import recovered
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compress import compress


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
        return Derived(compress(trained.model, chosen(options), data=trained.train))


class UniformSVDRecovered(UniformSVD):
    """The same, then `recover` for at most a quarter of the epochs."""

    name = "uniform-svd-recovered"
    words = "uniform-svd, then recover() for at most a quarter of the epochs"
    searches_rate: ClassVar = True

    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        return recovered(super().derive(trained, options), trained)
