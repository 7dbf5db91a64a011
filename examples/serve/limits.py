"""Requests that are too large are refused before anything reads them."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class Limited:
    """ASGI: takes in a request's body up to a limit, and passes it on whole.

    Args:
        app: what comes behind.
        max_body: bytes; larger requests get status 413.
    """

    def __init__(self, app: Any, max_body: int) -> None:
        self._app, self._max_body = app, max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        while more and len(body) <= self._max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self._max_body:
            error = f"Expected a request of at most {self._max_body:,} bytes, but got more."
            await JSONResponse({"error": error}, 413)(scope, receive, send)
            return
        whole: list[Any] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)
