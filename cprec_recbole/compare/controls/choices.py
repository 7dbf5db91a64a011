"""Controls that are Cp models with other options: narrower ones, and one idea at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from cprec_recbole.compare.controls.control import TrainedControl
from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.config import CompressionConfig, CompressionError
from cprec_recbole.costs import PARAMETERS, Unit

_WIDTHS = ("embedding_size", "hidden_size", "inner_size")  # RecBole's names of a model's widths


class Narrower(TrainedControl):
    """An uncompressed model with fewer dimensions, all its widths in proportion: the largest with
    no more parameters than the compressed one, or the smallest there is. As wide as the
    uncompressed model where even that is no larger.

    Attributes:
        unit: what both are measured in; the compressed one is in float.
    """

    by_size = True
    unit: ClassVar[Unit] = PARAMETERS
    name = "narrower"
    words = "an uncompressed model with fewer dimensions, about as many parameters"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        step = int(setting.config["n_heads"] or 1) if "n_heads" in setting.config else 1
        if setting.width <= step:
            raise CompressionError(
                f"Expected `{setting.spec.size_option}` to be above {step} for a narrower model, "
                f"but got {setting.width}."
            )
        sizes = range(step, setting.width + 1, step)  # attention heads divide the width
        limit = self.unit.other * setting.limit
        low, high = 0, len(sizes)  # sizes[low] fits, or is the smallest; sizes[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            total = setting.sizes(self._of_width(setting, sizes[middle]), self.unit).total
            low, high = (middle, high) if total <= limit else (low, middle)
        found = self._of_width(setting, sizes[low])
        total = setting.sizes(found, self.unit).total
        if setting.refused_size is not None and total > limit:
            raise CompressionError(
                f"Expected a budget of {total:,} {self.unit.name} or more, which is the narrowest "
                f"model, but got {limit:,}."
            )
        return found

    def _of_width(self, setting: Setting, size: int) -> dict[str, Any]:
        names = [n for n in _WIDTHS if n in setting.spec.architecture]
        share = size / setting.width
        widths = {name: max(1, round(setting.config[name] * share)) for name in names}
        return {**setting.uncompressed.as_dict(), **widths, setting.spec.size_option: size}


class OneRank(TrainedControl):
    """One low rank for all items in place of blocks: the largest in the compressed one's size."""

    name = "one-rank"
    words = "one low rank for all items, layers shared alike, the same size"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return one_rank(setting).as_dict()

    def differs(self, setting: Setting) -> bool:
        """See Control.differs; the compressed one may have one block itself."""
        own, other = one_rank(setting), setting.compression
        plans = [options.plan(setting.dim, setting.n_items) for options in (own, other)]
        return plans[0] != plans[1] or own.softmax != other.softmax


class Choice(TrainedControl):
    """The compressed model with one option changed."""

    changes: ClassVar[dict[str, Any]]

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return replace(setting.compression, **self.changes).as_dict()

    def differs(self, setting: Setting) -> bool:
        """See Control.differs: another option may come to the same model, as sharing where there is
        one layer, or a tree of one block."""
        own, other = chosen(self.options(setting)), setting.compression
        if own.tied != other.tied:
            return True
        n_blocks = len(other.plan(setting.dim, setting.n_items).ranks)
        layers = [setting.sizes(options.as_dict()).layers for options in (own, other)]
        return layers[0] != layers[1] or (own.softmax != other.softmax and n_blocks > 1)


class BlocksOnly(Choice):
    """Blocks without sharing."""

    name = "blocks-only"
    words = "the same blocks, no layers shared; as large as that makes it"
    changes: ClassVar = {"sharing": "none"}


class Tree(Choice):
    """The tree softmax."""

    name = "tree"
    words = "the same blocks and sharing with the tree softmax"
    changes: ClassVar = {"softmax": "tree"}


class Full(Choice):
    """The full softmax."""

    name = "full"
    words = "the same blocks and sharing with the full softmax"
    changes: ClassVar = {"softmax": "full"}


class Untied(Choice):
    """A softmax with factors of its own."""

    name = "untied"
    words = "the same blocks and sharing, the softmax with factors of its own; larger"
    changes: ClassVar = {"tied": False}


class Tied(Choice):
    """A softmax that reads the item table's factors."""

    name = "tied"
    words = "the same blocks and sharing, the softmax with the item table's factors"
    changes: ClassVar = {"tied": True}


class SharingOnly(TrainedControl):
    """Sharing without blocks."""

    name = "sharing-only"
    words = "an uncompressed table, layers shared alike; as large as that makes it"

    def options(self, setting: Setting) -> dict[str, Any]:
        """See Control.options."""
        return setting.layers_alone.as_dict()


def one_rank(setting: Setting) -> CompressionConfig:
    """One block of the largest rank that fits into the compressed model's size; or of rank 1."""
    plain = replace(setting.compression, cutoffs=(), ranks=(1,), softmax="full")
    layers = setting.sizes(plain.as_dict()).layers
    copies = 1 if plain.tied else 2
    for rank in range(setting.dim, 1, -1):
        options = replace(plain, ranks=(rank,))
        table = options.plan(setting.dim, setting.n_items).n_parameters
        if copies * table + layers <= setting.compressed.total:
            return options
    return plain


def chosen(options: dict[str, Any]) -> CompressionConfig:
    """The compression options among a contender's."""
    names = CompressionConfig.option_names()
    return CompressionConfig(**{name: options[name] for name in names if name in options})
