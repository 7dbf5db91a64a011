"""The models that are served: loaded, asked, and replaced while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from cprec_recbole import CompressionError, load_pretrained
from cprec_recbole.costs import part_sizes, saved_bytes
from cprec_recbole.models import CompressedRecommender


@dataclass(frozen=True, eq=False)
class Served:
    """A model as it was loaded once; a reload makes a new one.

    Attributes:
        model: in eval mode, never changed.
        version: 1 for the first that was loaded, then one more each time.
        parameters: of the model.
        bytes: of its weights in the folder; tokens come on top.
    """

    model: CompressedRecommender
    version: int
    parameters: int
    bytes: int

    @classmethod
    def load(cls, folder: Path, version: int) -> Served:
        """Read a folder, and answer once, so that the first request finds everything ready.

        Raises:
            CompressionError: a folder that `load_pretrained` refuses, or one without tokens.
        """
        model = load_pretrained(folder)
        model.build_index()
        model.recommend_tokens([model.known_vocabulary().token(1)], k=1)
        return cls(model, version, part_sizes(model).total, saved_bytes(model))

    @property
    def n_items(self) -> int:
        """Items that can be recommended."""
        return self.model.n_items - 1

    def facts(self) -> dict[str, Any]:
        """What there is to say about it, as JSON."""
        return {
            "kind": type(self.model).__name__.removeprefix("Cp"),
            "rows": self.model.table.quantized or "float",
            "items": self.n_items,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "version": self.version,
        }


@dataclass(frozen=True)
class Question:
    """A history of known tokens, for the model that was there when it came."""

    served: Served
    history: Sequence[str]
    k: int
    exclude_seen: bool = False


@dataclass(frozen=True)
class Best:
    """The best tokens, their scores, and the milliseconds and size of the batch they came from."""

    tokens: list[str]
    scores: list[float]
    milliseconds: float
    batch: int


def answers(questions: Sequence[Question]) -> list[Best | Exception]:
    """One answer or one exception for each question; one call for each model and `exclude_seen`."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault((id(question.served), question.exclude_seen), []).append(place)
    found: list[Best | Exception] = [RuntimeError("not answered")] * len(questions)
    for places in groups.values():
        group = [questions[place] for place in places]
        for place, answer in zip(places, _answered(group)):
            found[place] = answer
    return found


def _answered(group: Sequence[Question]) -> list[Best | Exception]:
    """Answers of one call with the largest k; each gets the first k of its own row."""
    first = group[0]
    started = perf_counter()
    try:
        best = first.served.model.recommend_tokens(
            [question.history for question in group],
            max(question.k for question in group),
            unknown="error",
            exclude_seen=first.exclude_seen,
        )
    except Exception as error:
        if len(group) == 1:
            return [error]
        return [answer for question in group for answer in _answered([question])]
    took = (perf_counter() - started) * 1e3
    return [
        Best(tokens[: question.k], scores[: question.k], took, len(group))
        for question, tokens, scores in zip(group, best.tokens, best.scores.tolist())
    ]


class Slot:
    """A name under which a model is served, and the folder that it comes from.

    Args:
        name: what requests call it.
        folder: read now and at each reload.

    Raises:
        CompressionError: a folder that cannot be served.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.served = Served.load(folder, 1)
        self._reloading = asyncio.Lock()

    async def reload(self) -> Served:
        """Load the folder again beside the model that is served, then put the new one in its place.

        Requests that came before are answered by the old model, later ones by the new.

        Raises:
            CompressionError: a folder that cannot be served; the old model goes on serving.
        """
        async with self._reloading:
            version = self.served.version + 1
            try:
                new = await asyncio.to_thread(Served.load, self.folder, version)
            except CompressionError:
                raise
            except Exception as error:  # whatever it is, the old model is still there
                raise CompressionError(
                    f"Expected {self.folder} to hold a model, but loading it failed: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self.served = new
            return new
