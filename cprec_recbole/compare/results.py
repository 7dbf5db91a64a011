"""What a comparison found: every run, and the summary over seeds."""

from __future__ import annotations

import json
import math
import os
import platform
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from cprec_recbole.config import CompressionError
from cprec_recbole.files import write_whole

UNCOMPRESSED, COMPRESSED = "uncompressed", "compressed"  # contenders in every comparison
QUALITY = "ndcg@20"  # what contenders are judged by
FORMAT = 1


@dataclass
class Run:
    """One contender, trained once.

    Attributes:
        contender: its name in the comparison.
        seed: seed of data order and weights.
        valid: metrics on the validation set at the best epoch.
        test: metrics on the test set, with the weights of that epoch.
        valid_curve: the validation metric after each evaluation.
        best_epoch: the epoch whose weights were kept, counted from 1.
        epoch_seconds: seconds of each training epoch, evaluation not included; none for what
            is made of a trained model.
        parameters: parameters by part.
        sharing: what the sharing scheme came to.
        weight_bytes: bytes of the saved `state_dict`; 0 for int8, which is kept in a folder.
        checkpoint_bytes: bytes of RecBole's checkpoint, which holds the optimizer's state too; 0
            where there is none.
        score_ms: median milliseconds to score the catalogue for one user.
        served_bytes: bytes of the weights as they are kept: parameters, in float or int8, codes,
            which block an item is in.
    """

    contender: str
    seed: int
    valid: dict[str, float]
    test: dict[str, float]
    valid_curve: list[float]
    best_epoch: int
    epoch_seconds: list[float]
    parameters: dict[str, int]
    sharing: str
    weight_bytes: int
    checkpoint_bytes: int
    score_ms: float = math.nan
    served_bytes: int = 0


@dataclass(frozen=True)
class Figure:
    """A figure over seeds: mean and sample standard deviation (NaN for one seed)."""

    mean: float
    spread: float


@dataclass
class Comparison:
    """All runs of a comparison, how to repeat it, and why other contenders failed."""

    command: str
    dataset: dict[str, Any]
    seeds: list[int]
    settings: dict[str, Any]
    contenders: dict[str, dict[str, Any]]
    configuration: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def figure(self, contender: str, quantity: Callable[[Run], float]) -> Figure:
        """Mean and spread of a quantity over the seeds of one contender; NaN where one has none."""
        values = [quantity(run) for run in self.runs if run.contender == contender]
        if any(math.isnan(value) for value in values):
            return Figure(math.nan, math.nan)
        return Figure(mean(values), stdev(values) if len(values) > 1 else math.nan)

    def rows(self) -> list[Row]:
        """The rows of the tables: the metrics that were measured, then sizes and times."""
        return [*(_metric_row(metric) for metric in self.runs[0].test), *COSTS]

    def sharing(self, contender: str) -> str:
        """What the sharing scheme came to for one contender."""
        return next(run.sharing for run in self.runs if run.contender == contender)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON: the runs as they are, and the summary that the tables show."""
        summary = {
            name: {
                row.label: {
                    "mean": _or_none((figure := self.figure(name, row.quantity)).mean),
                    "spread": _or_none(figure.spread),
                }
                for row in self.rows()
            }
            for name in self.contenders
        }
        plain = {k: v for k, v in asdict(self).items() if k != "runs"}
        return {
            "format": FORMAT,
            **plain,
            "summary": summary,
            "runs": [asdict(run) for run in self.runs],
        }


@dataclass(frozen=True)
class Row:
    """One row of the tables: a label, a quantity of a run, and how to write it."""

    label: str
    quantity: Callable[[Run], float]
    form: str


def _metric_row(metric: str) -> Row:
    label = metric.upper().replace("HIT", "HR")
    return Row(
        label=label,
        quantity=lambda run: run.test[metric],
        form=".4f",
    )


COSTS: tuple[Row, ...] = (
    Row("parameters: table", lambda run: run.parameters["table"], ",.0f"),
    Row("parameters: layers", lambda run: run.parameters["layers"], ",.0f"),
    Row("parameters: softmax", lambda run: run.parameters["softmax"], ",.0f"),
    Row("parameters", lambda run: run.parameters["total"], ",.0f"),
    Row("bytes of weights", lambda run: run.served_bytes or math.nan, ",.0f"),
    Row("saved weights (bytes)", lambda run: run.weight_bytes or math.nan, ",.0f"),
    Row("RecBole checkpoint (bytes)", lambda run: run.checkpoint_bytes or math.nan, ",.0f"),
    Row("seconds an epoch", lambda run: median(run.epoch_seconds or [math.nan]), ".2f"),
    Row("epochs to the best", lambda run: run.best_epoch, ".1f"),
    Row("ms to score a user", lambda run: run.score_ms, ".2f"),
)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and hardware.

    Args:
        device: what was run on; None for a GPU where there is one.
    """
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    packages = ("cprec_recbole", "recbole", "torch", "numpy", "pandas")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


def in_a_line(error: Exception) -> str:
    """Why something failed: what the user's own errors say, of all others their place as well."""
    if isinstance(error, CompressionError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def save(text: str, path: Path) -> None:
    """Write a file beside its place and rename it, so that a crash leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def as_json(comparison: Comparison) -> str:
    """The comparison as JSON."""
    return json.dumps(comparison.as_dict(), indent=2, allow_nan=False, default=str) + "\n"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
