"""Questions that come at the same time are answered together, by one thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Busy(Exception):
    """More questions wait than the limit allows, or the service is about to end."""


class _Waiting(NamedTuple):
    question: Any
    answer: asyncio.Future


class Batcher(Generic[Question, Answer]):
    """Gathers questions for a few milliseconds and has them answered in one call.

    While a batch is being answered the next one gathers, so that batches grow with the load. The
    call runs in a thread of its own: the event loop stays free, and the model sees one call at a
    time.

    Args:
        answer: from questions to one answer or one exception each, in the same order.
        max_batch: questions in a call at most.
        max_wait: seconds that the first of a batch waits for others at most.
        max_waiting: questions that may wait; the next one is turned away with Busy.
        observe: told the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Answer | Exception]],
        *,
        max_batch: int = 32,
        max_wait: float = 0.002,
        max_waiting: int = 1024,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._answer, self._observe = answer, observe
        self._max_batch, self._max_wait, self._max_waiting = max_batch, max_wait, max_waiting
        self._queue: asyncio.Queue[_Waiting | None] | None = None

    async def start(self) -> None:
        """Begin; questions can be asked from now on."""
        self._queue = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recommend")
        self._task = asyncio.create_task(self._run(self._queue))

    async def stop(self) -> None:
        """Answer what waits, and end."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.put_nowait(None)  # behind all questions
            await self._task
            self._thread.shutdown()

    async def ask(self, question: Question) -> Answer:
        """The answer to a question.

        Raises:
            Busy: too many wait, or the batcher has ended.
            Exception: what `answer` gave for this question.
        """
        if self._queue is None:
            raise Busy("the service is ending")
        if self._queue.qsize() >= self._max_waiting:
            raise Busy(f"{self._max_waiting} requests wait already")
        waiting = _Waiting(question, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def _run(self, queue: asyncio.Queue[_Waiting | None]) -> None:
        going = True
        while going:
            batch = await self._gathered(queue)
            going = batch[-1] is not None
            asked = [w for w in batch if w is not None and not w.answer.cancelled()]
            if asked:
                await self._settle(asked)

    async def _gathered(self, queue: asyncio.Queue[_Waiting | None]) -> list[_Waiting | None]:
        """At least one entry; None, the last there is, ends the batch."""
        batch = [await queue.get()]
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._max_wait
        while batch[-1] is not None and len(batch) < self._max_batch:
            if queue.empty() and clock() >= deadline:
                break
            try:
                left = max(deadline - clock(), 0)
                more = queue.get_nowait() if queue.qsize() else await _within(left, queue)
            except asyncio.TimeoutError:
                break
            batch.append(more)
        return batch

    async def _settle(self, asked: Sequence[_Waiting]) -> None:
        questions = [waiting.question for waiting in asked]
        self._observe(len(questions))
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self._answer, questions)
        except Exception as error:  # the batcher goes on, whatever happens to one batch
            found = [error] * len(asked)
        for waiting, answer in zip(asked, found):
            if waiting.answer.done():  # who asked has gone
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result(answer)


async def _within(seconds: float, queue: asyncio.Queue[_Waiting | None]) -> _Waiting | None:
    return await asyncio.wait_for(queue.get(), seconds)
