"""What a study does piece by piece, as records: how a contender is made, and what is to be done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cprec_recbole.compare.results import UNCOMPRESSED
from cprec_recbole.compare.study.spec import Cell, Spec, own_options
from cprec_recbole.config import CompressionConfig

MODEL = "model"  # what is built where no control builds it: a Cp model of its options


@dataclass(frozen=True)
class Recipe:
    """How a contender is made in a cell.

    Attributes:
        kind: `model` for a Cp model of these options, else the name of a control, or `recovered`.
        options: RecBole options that only it has.
    """

    kind: str
    options: dict[str, Any]

    def trial_key(
        self, cell: Cell, rate: float | None, seed: int, source: str | None = None
    ) -> str:
        """The name of one training; equal trainings have equal names, whoever asks for them.

        Args:
            cell: where it is trained.
            rate: learning rate; None where none is needed.
            seed: of the training.
            source: the name of what it goes on from, where it does.
        """
        text = json.dumps([self.kind, self.options, *([source] if source else [])], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        rated = "" if rate is None else f"_lr{rate:g}"
        return f"{cell}_{self.kind}-{digest}{rated}_s{seed}"


@dataclass(frozen=True)
class Planning:
    """Work: choose the compressed model of a ratio, and what follows from it for its controls."""

    cell: Cell
    ratio: float
    contenders: tuple[str, ...]

    @property
    def key(self) -> str:
        """The plan's name."""
        return f"{self.cell}_r{self.ratio:g}"

    @property
    def words(self) -> str:
        """What is being done, for the display."""
        return f"{self.cell.dataset} {self.cell.model} L{self.cell.length} ÷{self.ratio:g}: sizes"


@dataclass(frozen=True)
class Source:
    """A training of the uncompressed model that something is made of.

    Attributes:
        key: the trial whose weights it is.
        best_epoch: of it.
        valid: its quality on validation: another machine may train another model under that key.
    """

    key: str
    best_epoch: int
    valid: float

    @property
    def name(self) -> str:
        """What runs say that they are made of."""
        return f"{self.key}@{self.valid:g}"


@dataclass(frozen=True)
class Trial:
    """Work: make, train and measure one model.

    Attributes:
        source: for what is made of the trained uncompressed model: that training.
    """

    cell: Cell
    recipe: Recipe
    rate: float | None
    seed: int
    contender: str
    ratio: float | None
    source: Source | None = None

    @property
    def key(self) -> str:
        """The trial's name."""
        return self.recipe.trial_key(self.cell, self.rate, self.seed, self.source_name)

    @property
    def source_name(self) -> str | None:
        """What it goes on from; None where it starts afresh."""
        return None if self.source is None else self.source.name

    @property
    def words(self) -> str:
        """What is being done, for the display."""
        ratio = "" if self.ratio is None else f" ÷{self.ratio:g}"
        rate = "" if self.rate is None else f" rate {self.rate:g}"
        where = f"{self.cell.dataset} {self.cell.model} L{self.cell.length}"
        return f"{where} {self.contender}{ratio}{rate} seed {self.seed}"


Work = Planning | Trial


def recipe_without_ratio(spec: Spec, contender: str) -> Recipe:
    """How a contender is made that depends on no ratio: it needs no plan."""
    if contender in spec.settings:
        return Recipe(MODEL, spec.settings[contender])
    kind = MODEL if contender == UNCOMPRESSED else contender
    return Recipe(kind, own_options(CompressionConfig.uncompressed()))
