"""One truncated SVD of the trained table in place of blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from cprec_recbole.compare.controls.choices import chosen, one_rank
from cprec_recbole.compare.controls.control import Derived, DerivedControl, Trained
from cprec_recbole.compare.controls.int8 import INT8_BYTES
from cprec_recbole.compare.controls.recovered import RecoveredInt8, recovered
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compare.sizes import served_bytes
from cprec_recbole.compression.compress import compress
from cprec_recbole.compression.original import Original
from cprec_recbole.costs import estimate
from cprec_recbole.models.recommender import CompressedRecommender


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


class UniformSVDRecoveredInt8(RecoveredInt8):
    """What `recovered-int8` is, with one rank for all items in the same bytes: the largest that
    fits, beside its layers. Where that has one rank itself, the same model."""

    name = "uniform-svd-recovered-int8"
    words = "recovered-int8 with one rank for all items in the same bytes, layers shared alike"

    def compressed(self, trained: Trained, options: dict[str, Any]) -> CompressedRecommender:
        """See Recovered.compressed."""
        blocks = super().compressed(trained, options)
        original, limit = Original.of(trained.model), served_bytes(blocks)
        plain = replace(blocks.compression, ranks=(1,), cutoffs=(), softmax="full")

        def fits(rank: int) -> bool:
            config = replace(plain, ranks=(rank,))
            of = original.spec, original.inner, config, original.n_items, original.dim
            return estimate(*of, INT8_BYTES).sizes.total <= limit

        rank = next((rank for rank in range(original.dim, 1, -1) if fits(rank)), 1)
        config = replace(plain, ranks=(rank,))
        return compress(trained.model, config, data=trained.train, dtype="int8", verbose=False)
