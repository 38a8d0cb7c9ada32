"""Relaying one request to a model's engine, and its answer back, byte for byte.

The head of an answer is held until its first byte of body (in a stream, its first whole event) is here.
Until then a request whose engine is lost is given to the next generation, and the client sees nothing
of it. After that a stream ends with an error event, anything else with a cut connection.

A client that leaves cancels its request's task, wherever that waits; the engine's connection is closed
at once, which is how the engine learns to stop.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial

from loguru import logger
from starlette.types import Send

from citadel_supervisor.config import GatewaySettings
from citadel_supervisor.errors import CitadelError, NotReady, UpstreamError, UpstreamLost
from citadel_supervisor.events import RequestDone
from citadel_supervisor.gateway.asgi import Client, Header
from citadel_supervisor.gateway.backend import Lease
from citadel_supervisor.gateway.envelope import error_event, failure_of, refuse
from citadel_supervisor.gateway.exchange import Exchange
from citadel_supervisor.gateway.router import Chosen
from citadel_supervisor.gateway.sse import EventHold, report_error
from citadel_supervisor.gateway.upstream import UpstreamPool

GRACE_S = 0.25
"""After an engine failed a request, the time in which it may turn out that the engine itself is lost."""
CLIENT_LEFT = 499
"""Only in records: nobody is left to see it."""
NOT_IMPLEMENTED = 501
"""The one 5xx that says nothing of the engine's health: vLLM answers it for what a model cannot do."""

_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
        b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
_USUAL_CONNECTION = frozenset({b"keep-alive", b"close"})
_NOT_TO_ENGINE = _HOP_BY_HOP | {
    b"content-length", b"expect", b"host", b"x-request-id",
    # Keys and sessions are between the client and the gateway; an engine might log them.
    b"api-key", b"authorization", b"cookie", b"x-api-key",
}  # fmt: skip
_NOT_TO_CLIENT = _HOP_BY_HOP | {
    b"date", b"server", b"x-citadel-generation", b"x-citadel-model", b"x-request-id",
}  # fmt: skip


@dataclass(slots=True)
class Request:
    """One request on its way, and what became of it so far."""

    request_id: bytes
    endpoint: str
    query: bytes
    headers: list[Header]
    client: Client
    arrived: float
    """time.perf_counter() at its arrival."""
    body: bytes = b""
    model: str = ""
    status: int = 0
    """What was sent to the client; 0: nothing yet."""
    generation: int = 0
    attempts: int = 0
    waited_s: float = 0.0
    first_byte_s: float | None = None
    events: EventHold | None = None
    """Set once the answer is a stream of events."""

    def done(self) -> RequestDone:
        """The record of its end."""
        return RequestDone(
            request_id=self.request_id.decode("ascii"),
            model=self.model,
            endpoint=self.endpoint,
            status=self.status,
            duration_s=time.perf_counter() - self.arrived,
            first_byte_s=self.first_byte_s,
            generation=self.generation,
            attempts=self.attempts,
            streamed=self.events is not None,
            waited_s=self.waited_s,
        )


class Relay:
    """Relays requests over `pool`. Holds no state of a request."""

    def __init__(self, pool: UpstreamPool, settings: GatewaySettings) -> None:
        self._pool = pool
        self._wait_s = settings.restart_wait_s
        self._replays = settings.replays

    async def serve(self, request: Request, chosen: Chosen, send: Send) -> None:
        """Answer `request` by the chosen model. What became of it is in `request` at the end.

        Never raises on account of the engine or of the client's leaving.
        """
        request.model = chosen.model
        task = asyncio.current_task()
        assert task is not None
        request.client.watch(task.cancel)
        try:
            await self._answer(request, chosen, send)
        except asyncio.CancelledError:
            if not request.client.left:
                raise
            task.uncancel()
            request.status = CLIENT_LEFT
        finally:
            request.client.watch(None)

    async def _answer(self, request: Request, chosen: Chosen, send: Send) -> None:
        try:
            await self._until_answered(request, chosen, send)
        except UpstreamError as error:
            await _end_broken(request, error, send)
        except NotReady as error:
            await _refuse(request, error, send)

    async def _until_answered(self, request: Request, chosen: Chosen, send: Send) -> None:
        """Give the request to one generation after another until one answers."""
        while True:
            lease = await self._lease(request, chosen)
            try:
                return await self._attempt(request, lease, send)
            except UpstreamError as error:
                if request.status or request.attempts > self._replays:
                    raise
                logger.bind(request_id=request.request_id.decode(), model=request.model).info(
                    "generation {} failed a request before any output, trying the next: {}",
                    lease.generation,
                    error,
                )
                await _is_lost(lease)
            finally:
                lease.release()

    async def _lease(self, request: Request, chosen: Chosen) -> Lease:
        """A generation to use. What waiting costs is taken from the request's share of it."""
        began = time.perf_counter()
        try:
            lease = await chosen.backend.lease(max(0.0, self._wait_s - request.waited_s))
        finally:
            request.waited_s += time.perf_counter() - began
        request.attempts += 1
        request.generation = lease.generation
        return lease

    async def _attempt(self, request: Request, lease: Lease, send: Send) -> None:
        """One try on one generation. Raises UpstreamError; output has begun if `request.status` is set."""
        headers = _passed_on(request.headers, _NOT_TO_ENGINE)
        headers.append((b"x-request-id", request.request_id))
        target = request.endpoint.encode()
        if request.query:
            target += b"?" + request.query
        exchange = self._pool.send(lease.address, b"POST", target, headers, request.body)
        on_loss = partial(_lose, exchange)
        lease.lost.add_done_callback(on_loss)
        try:
            await exchange.start()
            if exchange.status >= 500 and exchange.status != NOT_IMPLEMENTED and await _is_lost(lease):
                raise UpstreamLost(f"the engine answered {exchange.status} and is gone")
            if _is_stream(exchange.headers):
                await _relay_stream(request, lease, exchange, send)
            else:
                await _relay_plain(request, exchange, send)
        finally:
            lease.lost.remove_done_callback(on_loss)
            exchange.abort()


async def _relay_plain(request: Request, exchange: Exchange, send: Send) -> None:
    data = await exchange.read()
    if exchange.error is not None:
        raise exchange.error  # it will not get whole: better given to another while nothing was sent
    more = not exchange.done
    await _begin(request, exchange, send)
    await send({"type": "http.response.body", "body": data, "more_body": more})
    while more:
        data = await exchange.read()
        more = not exchange.done
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _relay_stream(request: Request, lease: Lease, exchange: Exchange, send: Send) -> None:
    hold = EventHold()
    events = b""
    while not events and not exchange.done:
        events = hold.feed(await exchange.read())
    if report_error(events) and await _is_lost(lease):
        raise UpstreamLost("the engine began its stream with an error and is gone")
    if exchange.error is not None and not hold.over:
        raise exchange.error
    request.events = hold
    await _begin(request, exchange, send)
    while not exchange.done:
        if events:
            await send({"type": "http.response.body", "body": events, "more_body": True})
        events = hold.feed(await exchange.read())
    await send({"type": "http.response.body", "body": events + hold.rest(), "more_body": False})


async def _begin(request: Request, exchange: Exchange, send: Send) -> None:
    """Send the head of the answer: from here on the request is this generation's."""
    request.first_byte_s = time.perf_counter() - request.arrived
    request.status = exchange.status
    headers = _passed_on(exchange.headers, _NOT_TO_CLIENT)
    headers += _own_headers(request)
    await send({"type": "http.response.start", "status": exchange.status, "headers": headers})


async def _end_broken(request: Request, error: UpstreamError, send: Send) -> None:
    """End a request whose engine is lost for good, in the cleanest way that is left."""
    logger.bind(request_id=request.request_id.decode(), model=request.model).warning(
        "generation {} failed a request: {}", request.generation, error
    )
    if not request.status:
        await _refuse(request, error, send)
    elif request.events is not None and not request.events.torn:
        last = b""
        if not request.events.over:
            last = error_event(failure_of(error), request.endpoint, request.events.next_sequence)
        await send({"type": "http.response.body", "body": last, "more_body": False})
    else:
        request.client.cut()


async def _refuse(request: Request, error: CitadelError, send: Send) -> None:
    failure = failure_of(error)
    request.status = failure.status
    await refuse(send, failure, request.endpoint, _own_headers(request))


def _own_headers(request: Request) -> list[Header]:
    headers = [(b"x-request-id", request.request_id), (b"x-citadel-model", request.model.encode())]
    if request.generation:
        headers.append((b"x-citadel-generation", b"%d" % request.generation))
    return headers


def _passed_on(headers: list[Header], dropped: frozenset[bytes]) -> list[Header]:
    """`headers` without those `dropped` and those that Connection names as its hop's own."""
    for name, value in headers:
        if name == b"connection" and value.lower() not in _USUAL_CONNECTION:
            dropped |= {token.strip().lower() for token in value.split(b",")}
    return [header for header in headers if header[0] not in dropped]


def _is_stream(headers: list[Header]) -> bool:
    return any(
        name == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in headers
    )


def _lose(exchange: Exchange, lost: asyncio.Future[str]) -> None:
    """What `lost` resolves to ends the exchange, although its connection may still be open."""
    exchange.fail(UpstreamLost("its generation was given up" if lost.cancelled() else lost.result()))


async def _is_lost(lease: Lease) -> bool:
    """Whether the lease's generation is lost; gives that up to GRACE_S to turn out.

    Waits for the worker to know even where the processes are dead already: until then it is "ready", and a
    request would be given to the same generation once more.
    """
    if not lease.lost.done():
        await asyncio.wait([lease.lost], timeout=GRACE_S)
    return lease.lost.done() or not lease.alive()
