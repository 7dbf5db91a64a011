"""What compress() chose and what recover() reached, to print and to keep."""

from __future__ import annotations

from dataclasses import dataclass, field

from cprec_recbole.config import CompressionConfig


@dataclass(frozen=True)
class ChosenOptions:
    """What was chosen for a budget, and why.

    Attributes:
        compression: the options, ranks and cutoffs spelt out.
        parameters: of the model that they make; bytes of its weights where `unit` says so.
        limit: the most that the budget allows.
        reasons: a sentence for each choice.
        unit: what both are counted in: `parameters`, or `bytes` with int8.
    """

    compression: CompressionConfig
    parameters: int
    limit: int
    reasons: tuple[str, ...]
    unit: str = "parameters"

    def __str__(self) -> str:
        head = f"{self.parameters:,} {self.unit}, {self.limit:,} allowed"
        return "\n".join([head, *(f"  {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class WarmStart:
    """How near the start came to the original; squared errors of the hidden states, relative to
    their variance.

    Attributes:
        kept: the layer of each set whose parameters the set started from, counted from 0; None: the
            mean of all, or nothing is shared.
        copied: with those parameters as they are.
        refitted: after norms and unshared linear maps were refitted.
        fitted: after all layers were fitted by gradient, where any are shared.
    """

    kept: int | None
    copied: float
    refitted: float
    fitted: float


@dataclass
class Recovery:
    """What a recovery did, epoch by epoch; metrics by RecBole's names in lower case.

    Attributes:
        metric: what the best epoch was chosen by; empty without validation data.
        original: metrics of the original; empty without validation data or a teacher.
        start: of the compressed model before the first epoch.
        epochs: after each epoch.
        losses: mean training loss of each epoch.
        kept: the epoch whose weights the model now has, counted from 1; 0: those it started with.
    """

    metric: str = ""
    original: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    kept: int = 0

    def last_is_best(self) -> bool:
        """Whether no earlier epoch was as good as the latest, nor the start; always, where nothing
        was measured."""
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
        whole = self.original.get(self.metric, 0.0)
        rows = [("original", self.original)] if self.original else []
        rows += [("compressed", self.start)]
        first = len(rows) - 1
        rows += [(f"epoch {i}", found) for i, found in enumerate(self.epochs, start=1)]
        lines = [f"{self.metric} on the validation data"]
        for index, (name, found) in enumerate(rows):
            score = found[self.metric]
            share = f" {score / whole:7.1%}" if whole else ""
            mark = " (kept)" if index == self.kept + first else ""
            lines.append(f"  {name:<10} {score:.4f}{share}{mark}")
        return "\n".join(lines)
