"""What compress() chose and what recover() reached, to print and to keep."""

from __future__ import annotations

from dataclasses import dataclass, field

from cprec_recbole.config import CompressionConfig


@dataclass(frozen=True)
class ChosenOptions:
    """What was chosen for a budget, and why."""

    compression: CompressionConfig  # the options, ranks and cutoffs spelt out
    parameters: int  # of the model that they make; bytes of its weights where `unit` says so
    limit: int  # the most that the budget allows
    reasons: tuple[str, ...]  # a sentence for each choice
    unit: str = "parameters"  # what both are counted in: or `bytes`, with int8

    def __str__(self) -> str:
        head = f"{self.parameters:,} {self.unit}, {self.limit:,} allowed"
        return "\n".join([head, *(f"  {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class WarmStart:
    """How near the start came to the original; squared errors of the hidden states, relative to
    their variance."""

    # the layer of each set, counted from 0, whose parameters the set started from; None: the mean
    # of all, or nothing is shared
    kept: int | None
    copied: float  # with those parameters as they are
    refitted: float  # after norms and unshared linear maps were refitted
    fitted: float  # after all layers were fitted by gradient, where any are shared


@dataclass
class Recovery:
    """What a recovery did, epoch by epoch; metrics by RecBole's names in lower case, where there
    are validation data."""

    metric: str = ""  # what the best epoch was chosen by
    original: dict[str, float] = field(default_factory=dict)  # where there is a teacher
    start: dict[str, float] = field(default_factory=dict)  # before the first epoch
    epochs: list[dict[str, float]] = field(default_factory=list)  # after each epoch
    losses: list[float] = field(default_factory=list)  # mean training loss of each epoch
    kept: int = 0  # the epoch whose weights the model now has; 0: those it started with

    def last_is_best(self) -> bool:
        """Whether nothing before was as good as the latest epoch, or nothing was measured."""
        scores = [found[self.metric] for found in [self.start, *self.epochs]] if self.metric else []
        return all(scores[-1] > score for score in scores[:-1])

    def scores_before(self) -> str:
        """A line about the quality before the first epoch."""
        found = {"original": self.original, "compressed": self.start}
        scores = [f"{name} {x[self.metric]:.4f}" for name, x in found.items() if x]
        return f"{self.metric} {', '.join(scores)}"

    def last_epoch(self) -> str:
        """A line about the latest epoch."""
        score = f", {self.metric} {self.epochs[-1][self.metric]:.4f}" if self.metric else ""
        return f"epoch {len(self.losses)}, loss {self.losses[-1]:.4f}{score}"

    def __str__(self) -> str:
        if not self.metric:
            return f"{len(self.losses)} epochs, loss " + ", ".join(f"{x:.4f}" for x in self.losses)
        names = ["original", "compressed", *(f"epoch {i + 1}" for i in range(len(self.epochs)))]
        whole = self.original.get(self.metric, 0.0)
        lines = [f"{self.metric} on the validation data"]
        for name, found in zip(names, [self.original, self.start, *self.epochs]):
            if found:
                share = f" {found[self.metric] / whole:7.1%}" if whole else ""
                mark = " (kept)" if name == names[self.kept + 1] else ""
                lines.append(f"  {name:<10} {found[self.metric]:.4f}{share}{mark}")
        return "\n".join(lines)
