"""From a request to its answer: the model, its tokens, its batch; and reloading."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cprec_recbole import CompressionError
from examples.serve.batching import Batcher, Busy
from examples.serve.messages import Answer, Answers, Ask, AskMany, Failure, Options
from examples.serve.metrics import Metrics
from examples.serve.models import Best, Question, Slot, answers

log = logging.getLogger("uvicorn.error")


class Refused(Exception):
    """A request that gets an error: its HTTP status and what to say."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """Models by name, a batcher for each, and the metrics of all.

    Args:
        folders: what to serve, by name; the first answers requests that name none.
        max_batch: histories in a call at most.
        max_wait: seconds that a request waits for others at most.

    Raises:
        CompressionError: a folder that cannot be served.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        max_batch: int = 32,
        max_wait: float = 0.002,
    ) -> None:
        self.metrics = Metrics()
        self.slots = {name: Slot(name, Path(folder)) for name, folder in folders.items()}
        self._batchers: dict[str, Batcher[Question, Best]] = {}
        for name, slot in self.slots.items():
            observe = self.metrics.batches.labels(name).observe
            self._batchers[name] = Batcher(
                answers, max_batch=max_batch, max_wait=max_wait, observe=observe
            )
            self.metrics.show(slot)

    async def start(self) -> None:
        """Begin to answer."""
        for batcher in self._batchers.values():
            await batcher.start()

    async def stop(self) -> None:
        """Answer what waits, and end."""
        for batcher in self._batchers.values():
            await batcher.stop()

    def slot(self, name: str | None) -> Slot:
        """The slot of a name; the first if left out. Refused: no such name."""
        if name is None:
            return next(iter(self.slots.values()))
        if name not in self.slots:
            known = ", ".join(self.slots)
            raise Refused(404, f"Expected `model` to be one of {known}, but got {name!r:.60}.")
        return self.slots[name]

    async def recommend(self, asked: Ask) -> Answer:
        """The answer to one history. Refused: one that cannot be answered."""
        return await self._answer(self.slot(asked.model), asked.history, asked)

    async def recommend_many(self, asked: AskMany) -> Answers:
        """An answer or an error for each history. Refused: no such model, or too much to do."""
        answer = partial(self._answer, self.slot(asked.model), options=asked)
        found = await asyncio.gather(*map(answer, asked.histories), return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException) and getattr(each, "status", 500) != 422:
                raise each
        return Answers(
            answers=[
                each if isinstance(each, Answer) else Failure(error=str(each)) for each in found
            ]
        )

    async def reload(self, name: str | None = None) -> dict[str, Any]:
        """Load one model again, or all. Refused: a folder is broken; its old model stays, and the
        others are loaded."""
        slots = [self.slot(name)] if name is not None else list(self.slots.values())
        failed = [error for slot in slots if (error := await self._reloaded(slot))]
        if failed:
            raise Refused(409, "; ".join(failed) + " The old model goes on serving.")
        return {slot.name: slot.served.facts() for slot in slots}

    async def _reloaded(self, slot: Slot) -> str | None:
        """The error, if there was one."""
        try:
            served = await slot.reload()
        except CompressionError as error:
            self.metrics.reloads.labels(slot.name, "failed").inc()
            log.error("reload of %s failed: %s", slot.name, error)
            return f"{slot.name}: {error}"
        self.metrics.reloads.labels(slot.name, "done").inc()
        self.metrics.show(slot)
        log.info("reload of %s: version %d", slot.name, served.version)
        return None

    async def _answer(self, slot: Slot, history: Sequence[str], options: Options) -> Answer:
        question, skipped = _question(slot, history, options)
        try:
            best = await self._batchers[slot.name].ask(question)
        except Busy as error:
            raise Refused(503, f"Too much to do: {error}. Try again later.") from error
        except CompressionError as error:
            raise Refused(422, str(error)) from error
        return Answer(
            tokens=best.tokens,
            scores=best.scores,
            skipped=skipped,
            model=slot.name,
            version=question.served.version,
            milliseconds=round(best.milliseconds, 3),
            batch=best.batch,
        )


def _question(slot: Slot, history: Sequence[str], options: Options) -> tuple[Question, list[str]]:
    """What to ask the model, and the tokens that it does not know; everything is checked here, so
    that what is bad about one request never reaches a batch."""
    served = slot.served
    vocabulary = served.model.known_vocabulary()
    known = [token for token in history if token in vocabulary]
    skipped = [token for token in history if token not in vocabulary]
    if not history:
        raise Refused(422, "Expected `history` to hold a token, but it is empty.")
    if skipped and (options.strict or not known):
        shown = ", ".join(map(repr, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        few = "tokens" if options.strict else "a token"
        raise Refused(
            422,
            f"Expected `history` to hold {few} of the catalogue, but {len(skipped)} of "
            f"{len(history)} are not in it: {shown}.",
        )
    left = served.n_items - (len(set(known)) if options.exclude_seen else 0)
    if options.k > left:
        raise Refused(
            422,
            f"Expected `k` to be from 1 to the {left} items that may be recommended, but got "
            f"{options.k}.",
        )
    return Question(served, known, options.k, options.exclude_seen), skipped
