"""What /metrics shows, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

from examples.serve.models import Slot

__all__ = ["CONTENT_TYPE", "Measured", "Metrics"]

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one service, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        named: dict[str, Any] = {"namespace": "cprec", "registry": registry}
        self.requests = Counter("requests", "Requests.", ["path", "status"], **named)
        self.errors = Counter("errors", "Answers of status 400 and above.", ["path"], **named)
        self.seconds = Histogram(
            "request_seconds", "From a request to its answer.", ["path"], buckets=SECONDS, **named
        )
        self.batches = Histogram(
            "batch_size", "Histories in one call.", ["model"], buckets=BATCHES, **named
        )
        self.reloads = Counter("reloads", "Reloads.", ["model", "result"], **named)
        self._version = Gauge("model_version", "Loaded so many times.", ["model"], **named)
        self._parameters = Gauge("model_parameters", "Parameters.", ["model"], **named)
        self._bytes = Gauge("model_bytes", "Bytes of the weights.", ["model"], **named)

    def show(self, slot: Slot) -> None:
        """Remember what a slot serves now."""
        self._version.labels(slot.name).set(slot.served.version)
        self._parameters.labels(slot.name).set(slot.served.parameters)
        self._bytes.labels(slot.name).set(slot.served.bytes)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class Measured:
    """ASGI: counts and times requests. Paths that there are not are counted as `other`."""

    def __init__(self, app: Any, metrics: Metrics, paths: Iterable[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        started, status = perf_counter(), 499  # nobody waits for an answer any more

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(perf_counter() - started)
            if status >= 400 and status != 499:
                self._metrics.errors.labels(path).inc()
