"""What controls are measured by: the compressed model of a comparison, and sizes of others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from cprec_recbole.config import CompressionConfig
from cprec_recbole.costs import PARAMETERS, PartSizes, Unit, estimate
from cprec_recbole.models.from_config import compression_of
from cprec_recbole.models.spec import ModelSpec


@dataclass(frozen=True)
class Setting:
    """A model, a catalogue, and the compressed contender that controls stand beside.

    Attributes:
        config: a RecBole config of the Cp model, with the options that all contenders share.
        dataset: RecBole's dataset, or anything with `iid_field`, `item_num` and `num(field)`.
        compression: the options of the contender `compressed`.
        refused_size: parameters that it should have had, where it cannot be that small.
    """

    config: Any
    dataset: Any
    compression: CompressionConfig
    refused_size: int | None = None

    @property
    def spec(self) -> ModelSpec:
        """What compression knows of the model."""
        return self.config.model_class.spec

    @property
    def width(self) -> int:
        """The model's width, as its option says it."""
        return int(self.config[self.spec.size_option])

    @property
    def dim(self) -> int:
        """Size `d` of an uncompressed item vector."""
        return self.spec.dim(self.width)

    @property
    def n_items(self) -> int:
        """Items of the catalogue, padding included."""
        return int(self.dataset.item_num)

    @cached_property
    def compressed(self) -> PartSizes:
        """Parameters of the contender `compressed`, by part."""
        return self.sizes(self.compression.as_dict())

    @property
    def limit(self) -> int:
        """Parameters that an equally large contender may have."""
        return self.compressed.total if self.refused_size is None else self.refused_size

    @property
    def table_limit(self) -> int:
        """Parameters that a tied table may have beside the compressed one's layers."""
        return self.compressed.total - self.compressed.layers

    @property
    def uncompressed(self) -> CompressionConfig:
        """The options that lose nothing, for the same objective."""
        same = self.compression.training, self.compression.loss_memory
        return CompressionConfig.uncompressed(*same)

    @property
    def layers_alone(self) -> CompressionConfig:
        """The compressed contender's shared layers under an uncompressed, tied table."""
        return replace(self.uncompressed, sharing=self.compression.sharing)

    def sizes(self, options: dict[str, Any], unit: Unit = PARAMETERS) -> PartSizes:
        """What a Cp model with other options costs by part, without building its table.

        Args:
            options: RecBole options that win over those of the config.
            unit: what is counted.
        """
        config = _Changed(self.config, options)
        with torch.random.fork_rng(devices=[]):
            inner = self.spec.build_inner(config, self.dataset)
        dim = self.spec.dim(int(config[self.spec.size_option]))
        compression = compression_of(config)
        return estimate(self.spec, inner, compression, self.n_items, dim, unit).sizes


class _Changed:
    """A config as a model reads it, some of its options replaced."""

    def __init__(self, config: Any, options: dict[str, Any]) -> None:
        self._config, self._options = config, options

    def __getitem__(self, name: str) -> Any:
        return self._options[name] if name in self._options else self._config[name]

    def __contains__(self, name: str) -> bool:
        return name in self._options or name in self._config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
