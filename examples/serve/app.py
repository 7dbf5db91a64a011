"""The routes."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from cprec_recbole import CompressionError
from examples.serve.limits import Limited
from examples.serve.messages import MAX_BODY, Answer, Answers, Ask, AskMany, Failure, Reload
from examples.serve.metrics import CONTENT_TYPE, Measured
from examples.serve.service import Refused, Service

PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure} for code in (404, 409, 413, 422, 503)
}
router = APIRouter(responses=ERRORS)


def create_app(folders: Mapping[str, Path], titles: Path | None = None, **options: Any) -> FastAPI:
    """The service as an ASGI application.

    Args:
        folders: what to serve, by name; the first answers requests that name none.
        titles: a JSON list of `{"token", "title"}` objects for the page; may be left out.
        options: see Service.

    Raises:
        CompressionError: a folder or a file that cannot be served.
    """
    service = Service(folders, **options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        with _ReloadOnHangup(service):
            yield
        await service.stop()

    app = FastAPI(title="cprec_recbole", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.titles = _titles(titles, service)
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE))
    paths = {getattr(route, "path", "") for route in router.routes}
    app.add_middleware(Limited, max_body=MAX_BODY)
    app.add_middleware(Measured, metrics=service.metrics, paths=paths)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    return app


@router.post("/recommend")
async def recommend(asked: Ask, request: Request) -> Answer:
    """The best next items for one history."""
    return await _service(request).recommend(asked)


@router.post("/recommend/many")
async def recommend_many(asked: AskMany, request: Request) -> Answers:
    """The best next items for each of several histories; a bad one gets an error of its own."""
    return await _service(request).recommend_many(asked)


@router.post("/reload")
async def reload(request: Request, asked: Reload | None = None) -> dict[str, Any]:
    """Load one model again, or all of them, without dropping a request."""
    return await _service(request).reload(asked.model if asked else None)


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """That it serves, and which versions."""
    slots = _service(request).slots.values()
    return {"status": "ok", "versions": {slot.name: slot.served.version for slot in slots}}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """What is served, by name, the first first."""
    return {slot.name: slot.served.facts() for slot in _service(request).slots.values()}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE)


@router.get("/titles")
async def titles(request: Request) -> JSONResponse:
    """Titles of the items, where there are any, in the order in which the page offers them."""
    return JSONResponse(request.app.state.titles)


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _titles(file: Path | None, service: Service) -> list[dict[str, Any]]:
    """Titles of the items that every model knows."""
    if file is None:
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known = [slot.served.model.known_vocabulary() for slot in service.slots.values()]
        shown = [film for film in found if all(film["token"] in each for each in known)]
        return [{**film, "title": str(film["title"])} for film in shown]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CompressionError(
            f"Expected `titles` to be a JSON list of objects with token and title, but {file} is "
            f"none: {error!r}."
        ) from error


class _ReloadOnHangup:
    """Within: SIGHUP loads all models again. Where signals cannot be had (Windows, a thread that is
    not the main one) nothing happens."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> None:
        with suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def __exit__(self, *raised: object) -> None:
        with suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)

    def _reload(self) -> None:
        task = asyncio.create_task(self._quietly())
        self._tasks.add(task)  # asyncio itself keeps no task alive
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self) -> None:
        with suppress(Refused):  # it has been logged
            await self._service.reload()


def _answer(status: int, message: str) -> JSONResponse:
    printable = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"error": printable}, status)


async def _refused(request: Request, error: Any) -> JSONResponse:
    return _answer(error.status, str(error))


async def _not_valid(request: Request, error: Any) -> JSONResponse:
    """Where it is wrong and how, without what was sent, which may be long."""
    found = error.errors()
    told = []
    for each in found[:3]:
        if each["type"] == "json_invalid":
            told.append(f"not JSON: {each.get('ctx', {}).get('error', '')}")
            continue
        where = ".".join(str(part) for part in each["loc"][1:])[:80]
        if not where:
            told.append("Expected a JSON object, sent as Content-Type: application/json")
            continue
        told.append(f"{where}: {each['msg'].removeprefix('Value error, ')}")
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return _answer(422, "; ".join(told) + more)


async def _http_error(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)


async def _failed(request: Request, error: Any) -> JSONResponse:
    return _answer(500, "The service failed to answer; its log says why.")
