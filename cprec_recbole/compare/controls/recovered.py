"""The trained model compressed and recovered: what the product is for."""

from __future__ import annotations

from typing import Any, ClassVar

from cprec_recbole.compare.controls.choices import chosen
from cprec_recbole.compare.controls.control import Derived, DerivedControl, Trained
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compression.compress import compress
from cprec_recbole.compression.original import Original
from cprec_recbole.compression.recover import LEARNING_RATE, recover
from cprec_recbole.costs import estimate
from cprec_recbole.models.recommender import CompressedRecommender


class Recovered(DerivedControl):
    """The trained model compressed with the options of the compressed one, or to a ratio where that
    is among them, then `recover` for at most a quarter of the epochs."""

    name = "recovered"
    words = "the trained uncompressed model compressed alike, then recover() for a quarter as long"
    searches_rate: ClassVar = True

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return setting.compression.as_dict()

    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        return recovered(Derived(self.compressed(trained, options)), trained)

    def compressed(self, trained: Trained, options: dict[str, Any]) -> CompressedRecommender:
        """The model before the recovery."""
        given = options if "ratio" in options else chosen(options).as_dict()
        # how the model is trained on is the loader's
        given = {name: value for name, value in given.items() if name != "training"}
        return compress(trained.model, data=trained.train, verbose=False, **given)


class RecoveredInt8(Recovered):
    """The same with matrices in int8, in the bytes of the compressed one in float: four times the
    rank."""

    by_size = True  # int8 may reach what float cannot
    name = "recovered-int8"
    words = "the trained model compressed in int8 to the same bytes, then recover() likewise"

    def compressed(self, trained: Trained, options: dict[str, Any]) -> CompressedRecommender:
        """See Recovered.compressed."""
        if "ratio" in options:
            return super().compressed(trained, {**options, "dtype": "int8"})
        original, config = Original.of(trained.model), chosen(options)
        whole = estimate(original.spec, original.inner, config, original.n_items, original.dim)
        return compress(
            trained.model,
            data=trained.train,
            size=whole.sizes.total * original.table.element_size(),
            dtype="int8",
            softmax=config.softmax,
            tied=config.tied,
            loss_memory=config.loss_memory,
            verbose=False,
        )


class UncompressedRecovered(DerivedControl):
    """The original itself after a recovery of the same length: what of a recovered model's quality
    is the recovery's doing."""

    name = "uncompressed-recovered"
    words = "the trained uncompressed model, not compressed, then recover() likewise"
    searches_rate: ClassVar = True

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return setting.uncompressed.as_dict()

    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        same = compress(trained.model, chosen(options), data=trained.train, verbose=False)
        return recovered(Derived(same), trained)


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
        learning_rate=LEARNING_RATE if rate is None else rate,
    )
    return Derived(start.model, found)
