"""Matrices in int8 after training and nothing else: the simplest thing that one can do."""

from __future__ import annotations

from typing import Any

from cprec_recbole.compare.controls.choices import Narrower, chosen
from cprec_recbole.compare.controls.control import (
    Derived,
    DerivedControl,
    Trained,
    TrainedControl,
)
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.compression.compress import compress
from cprec_recbole.compression.quantize import quantize
from cprec_recbole.costs import BYTES_PER_FLOAT, Unit
from cprec_recbole.int8 import BYTES_PER_SCALE
from cprec_recbole.models.recommender import CompressedRecommender

INT8_BYTES = Unit("bytes in int8", entry=1, row=BYTES_PER_SCALE, other=BYTES_PER_FLOAT)


class Int8(DerivedControl):
    """All matrices of the trained uncompressed model in int8."""

    name = "int8"
    words = "the trained uncompressed model in int8, no training after"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return setting.uncompressed.as_dict()

    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """See DerivedControl.derive."""
        plain, data = chosen(options), trained.train
        return Derived(compress(trained.model, plain, data=data, dtype="int8", verbose=False))


class TrainedInt8(TrainedControl):
    """A model of given options, trained in float, then all its matrices in int8: what a study's
    setting with `dtype: int8` is."""

    name = "trained-int8"
    words = "a model of the setting's options, trained and then in int8"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return setting.compression.as_dict()

    def finished(self, model: CompressedRecommender) -> CompressedRecommender:
        """See TrainedControl.finished."""
        return quantize(model)


class NarrowerInt8(Narrower):
    """The widest uncompressed model whose bytes in int8 are no more than the compressed one's in
    float: trained in float, then all its matrices in int8."""

    name = "narrower-int8"
    words = "a model with fewer dimensions, trained and then in int8: about as many bytes"
    unit = INT8_BYTES

    def finished(self, model: CompressedRecommender) -> CompressedRecommender:
        """See TrainedControl.finished."""
        return quantize(model)
