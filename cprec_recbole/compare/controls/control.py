"""What a control is: a contender that a sceptic would ask for, trained or derived."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from recbole.utils import get_model

from cprec_recbole.compare.controls.setting import Setting
from cprec_recbole.models.recommender import CompressedRecommender
from cprec_recbole.results import Recovery


class Control(ABC):
    """One control. What it costs follows from the setting; nothing is tuned by hand.

    Attributes:
        name: what tables and the command line call it.
        words: what it is, in a line.
        by_size: whether it follows from a size alone, so that it is there where the compressed
            model cannot be that small.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    by_size: ClassVar[bool] = False

    @abstractmethod
    def options(self, setting: Setting) -> dict[str, Any]:
        """RecBole options that only this contender has, for one setting.

        Raises:
            CompressionError: there is no such control for this setting.
        """

    def differs(self, setting: Setting) -> bool:
        """Whether it is another model than the contender `compressed`."""
        return True


class TrainedControl(Control):
    """A control that is trained from scratch, by the same trainer on the same data."""

    def build(self, config: Any, dataset: Any) -> CompressedRecommender:
        """The fresh model.

        Args:
            config: a RecBole config with what `options` gave.
            dataset: the training split.
        """
        return get_model(config["model"])(config, dataset)

    def finished(self, model: CompressedRecommender) -> CompressedRecommender:
        """What is measured of the trained model: itself, or what is made of it, itself left as it
        was."""
        return model

    @property
    def is_plain(self) -> bool:
        """Whether it is a Cp model of its options and nothing else."""
        own, base = type(self), TrainedControl
        return own.build is base.build and own.finished is base.finished


@dataclass(frozen=True)
class Trained:
    """A trained uncompressed model, and what a derived contender may use beside it.

    Attributes:
        model: the model with its best epoch's weights; it is left as it was.
        train: RecBole's training data loader.
        valid: its validation data.
        epochs: epochs until the best one.
        seed: of the training.
        learning_rate: for a recovery; None for that of `recover`.
    """

    model: CompressedRecommender
    train: Any
    valid: Any
    epochs: int
    seed: int
    learning_rate: float | None = None

    @property
    def budget(self) -> int:
        """Epochs of a recovery: a quarter of those until the best, one at least."""
        return max(1, self.epochs // 4)


class Derived(NamedTuple):
    """What was made of a trained model; `recovery` where it was trained further."""

    model: CompressedRecommender
    recovery: Recovery | None = None


class DerivedControl(Control):
    """A control that is made of the trained uncompressed model."""

    searches_rate: ClassVar[bool] = False  # whether it is trained, at a rate that matters

    @abstractmethod
    def derive(self, trained: Trained, options: dict[str, Any]) -> Derived:
        """Make it.

        Args:
            trained: the uncompressed model.
            options: what `options` gave.
        """
