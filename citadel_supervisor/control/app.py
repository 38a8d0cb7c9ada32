"""The control API's routes: each one reads its input strictly, asks the daemon, and answers JSON."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import msgspec
from loguru import logger
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from citadel_supervisor import __version__
from citadel_supervisor.control.logtail import stream_log
from citadel_supervisor.control.peers import Peer
from citadel_supervisor.control.protocol import (
    API,
    DEFAULT_LOG_LINES,
    HTTP_STATUS,
    MAX_BODY,
    MAX_LOG_LINES,
    ErrorCode,
    SupervisorApi,
    describe,
    error_body,
)
from citadel_supervisor.errors import CitadelError, UnknownModel
from citadel_supervisor.events import Audit, Event

_BODY_DEADLINE_S = 30.0
_TARGET_SHOWN = 64
"""Characters of a caller's model name that are kept in the audit trail."""


class WaitBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `start` and `drain`."""

    wait: bool = True


class DrainBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `stop` and `restart`."""

    wait: bool = True
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] | None = None


class NoBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `reload`."""


BodyT = TypeVar("BodyT", bound=msgspec.Struct)


class ApiError(Exception):
    """An answer that is an error of the API's own."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        self.code = code
        super().__init__(message)


class ControlApp:
    """The routes over `api`. Every command that changes something ends in an `Audit` to `publish`."""

    def __init__(
        self,
        api: SupervisorApi,
        publish: Callable[[Event], None],
        stopping: asyncio.Event,
        log_poll_s: float,
    ) -> None:
        self._api = api
        self._publish = publish
        self._stopping = stopping
        self._log_poll_s = log_poll_s
        self._reloading = asyncio.Lock()

    def asgi(self) -> ASGIApp:
        routed = self._routed()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await routed(scope, receive, send)
            except Exception as error:  # a bug; where it still could be, it was answered by _on_bug
                logger.opt(exception=error).error("control API: a bug answering {}", scope["path"])

        return app

    def _routed(self) -> Starlette:
        return Starlette(
            routes=[
                Route(f"/{API}/version", self.version),
                Route(f"/{API}/status", self.status),
                Route(f"/{API}/models/{{model}}", self.model),
                *(
                    Route(f"/{API}/models/{{model}}/{action}", self.command(action), methods=["POST"])
                    for action in ("start", "stop", "restart", "drain")
                ),
                Route(f"/{API}/reload", self.reload, methods=["POST"]),
                Route(f"/{API}/events", self.events),
                Route(f"/{API}/logs/{{model}}", self.logs),
            ],
            exception_handlers={
                CitadelError: _on_error,
                ApiError: _on_error,
                HTTPException: _on_http,
                ClientDisconnect: _on_left,
                Exception: _on_bug,
            },
        )

    async def version(self, request: Request) -> Response:
        _query(request)
        return JSONResponse({"version": __version__, "api": API, "pid": os.getpid()})

    async def status(self, request: Request) -> Response:
        _query(request)
        return JSONResponse(self._api.status())

    async def model(self, request: Request) -> Response:
        _query(request)
        models = self._api.status()["models"]
        name = request.path_params["model"]
        if name not in models:
            raise UnknownModel(name, list(models))
        return JSONResponse(models[name])

    def command(self, action: str) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of one of the four commands on a model."""

        async def endpoint(request: Request) -> Response:
            _query(request)
            model: str = request.path_params["model"]
            call: Coroutine[Any, Any, dict[str, Any]]
            if action in ("stop", "restart"):
                body = await _body(request, DrainBody)
                command = self._api.stop if action == "stop" else self._api.restart
                call = command(model, body.wait, body.drain_s)
            else:
                wait = (await _body(request, WaitBody)).wait
                call = (self._api.start if action == "start" else self._api.drain)(model, wait)
            return await self._audited(request, action, model, self._while_wanted(request, call))

        return endpoint

    async def reload(self, request: Request) -> Response:
        _query(request)
        await _body(request, NoBody)
        return await self._audited(request, "reload", "configuration", self._reload_alone())

    async def _reload_alone(self) -> dict[str, Any]:
        if self._reloading.locked():
            raise ApiError(ErrorCode.REFUSED, "a reload is already under way; try again when it is done")
        async with self._reloading:
            return await self._api.reload()

    async def _audited(
        self, request: Request, action: str, target: str, call: Coroutine[Any, Any, dict[str, Any]]
    ) -> Response:
        """The answer of `call`, and a record of who asked for it and how it ended."""
        outcome = str(ErrorCode.INTERNAL)
        try:
            answer = await call
            outcome = "ok"
            return JSONResponse(answer)
        except ClientDisconnect:
            outcome = "caller left before the end"
            raise
        except ApiError as error:
            outcome = str(error.code)
            raise
        except CitadelError as error:
            outcome = str(describe(error)[0])
            raise
        finally:
            peer: Peer = request.state.peer
            self._publish(
                Audit(
                    uid=peer.uid, pid=peer.pid, action=action, target=target[:_TARGET_SHOWN], outcome=outcome
                )
            )

    async def _while_wanted(
        self, request: Request, call: Coroutine[Any, Any, dict[str, Any]]
    ) -> dict[str, Any]:
        """The result of `call`, unless the caller leaves or the daemon stops before there is one.

        Without this a caller that sends commands and hangs up would leave a waiting task behind each time.
        """
        command = asyncio.ensure_future(call)
        left = asyncio.ensure_future(_disconnected(request))
        stopping = asyncio.ensure_future(self._stopping.wait())
        tasks: tuple[asyncio.Future[Any], ...] = (command, left, stopping)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if command.done():
                return command.result()
            if left.done():
                raise ClientDisconnect
            raise ApiError(ErrorCode.STOPPING, "the supervisor is stopping")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def events(self, request: Request) -> Response:
        follow = _flag(_query(request, "follow"), "follow")
        return StreamingResponse(self._event_lines(follow), media_type="application/x-ndjson")

    async def _event_lines(self, follow: bool) -> AsyncIterator[bytes]:
        """The kept events as JSON lines, then those to come: none lost and none twice at the seam."""
        if not follow:
            for event in self._api.recent_events():
                yield _line(event)
            return
        events = self._api.follow_events()
        upcoming = asyncio.ensure_future(anext(events))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.sleep(0)  # the iterator's first step subscribes; only then look back
            kept = self._api.recent_events()
            for event in kept:
                yield _line(event)
            while True:
                await asyncio.wait((upcoming, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done():
                    return
                event = upcoming.result()
                upcoming = asyncio.ensure_future(anext(events))
                if event in kept:
                    continue
                kept = []
                yield _line(event)
        finally:
            stopping.cancel()
            upcoming.cancel()
            await asyncio.gather(stopping, upcoming, return_exceptions=True)

    async def logs(self, request: Request) -> Response:
        query = _query(request, "follow", "lines")
        follow = _flag(query, "follow")
        text = query.get("lines", str(DEFAULT_LOG_LINES))
        if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) <= MAX_LOG_LINES):
            raise ApiError(ErrorCode.INVALID, f"lines: must be a number from 0 to {MAX_LOG_LINES}")
        path = self._api.log_path(request.path_params["model"])
        content = stream_log(
            path, lines=int(text), follow=follow, stopping=self._stopping, poll_s=self._log_poll_s
        )
        return StreamingResponse(content, media_type="text/plain; charset=utf-8")


def _line(event: dict[str, Any]) -> bytes:
    return msgspec.json.encode(event) + b"\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _query(request: Request, *known: str) -> dict[str, str]:
    """The query's values. Raises ApiError for a key that is not `known` or that comes twice."""
    pairs = request.query_params.multi_items()
    for key, _ in pairs:
        if key not in known:
            accepted = ", ".join(known) if known else "none"
            raise ApiError(
                ErrorCode.INVALID, f"unknown query parameter {key[:_TARGET_SHOWN]!r}; accepted: {accepted}"
            )
    if len(pairs) != len(dict(pairs)):
        raise ApiError(ErrorCode.INVALID, "a query parameter is given twice")
    return dict(pairs)


def _flag(query: dict[str, str], key: str) -> bool:
    value = query.get(key, "0")
    if value not in ("0", "1", "false", "true"):
        raise ApiError(ErrorCode.INVALID, f"{key}: must be 0 or 1")
    return value in ("1", "true")


async def _body(request: Request, kind: type[BodyT]) -> BodyT:
    """The JSON body as `kind`; none at all means the defaults. Raises ApiError."""
    raw = bytearray()
    try:
        async with asyncio.timeout(_BODY_DEADLINE_S):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > MAX_BODY:
                    raise ApiError(ErrorCode.TOO_LARGE, f"the body is larger than {MAX_BODY} bytes")
    except TimeoutError:
        raise ApiError(ErrorCode.TIMEOUT, f"the body did not arrive within {_BODY_DEADLINE_S:g} s") from None
    if not raw:
        return kind()
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(ErrorCode.INVALID, f"the body is not what this call takes: {error}") from None


def _answer(code: ErrorCode, body: dict[str, Any]) -> Response:
    # What is left of a body that was not read must not be taken for the next request.
    headers = {"connection": "close"} if code in (ErrorCode.TOO_LARGE, ErrorCode.TIMEOUT) else None
    return JSONResponse(body, HTTP_STATUS[code], headers)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return _answer(error.code, error_body(error.code, str(error)))
    assert isinstance(error, CitadelError)
    return _answer(*describe(error))


async def _on_http(request: Request, error: Exception) -> Response:
    """What the routing itself refuses."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        body = error_body(ErrorCode.METHOD, f"{request.method} is not allowed here")
        return JSONResponse(body, error.status_code, error.headers)
    return _answer(ErrorCode.NOT_FOUND, error_body(ErrorCode.NOT_FOUND, "no such resource; see /v1/status"))


async def _on_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this, for the log.
    return _answer(ErrorCode.INTERNAL, error_body(ErrorCode.INTERNAL, "internal error; see the daemon's log"))
