"""One request to an engine and its answer, on one connection: HTTP/1.1 by asyncio's callbacks and httptools.

Body bytes are handed on as they come, never parsed. What happens to a request is in its `Exchange`;
what its `Connection` does to it arrives by callback, so that a request costs no task and, on a kept
connection, no wait but for its answer.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

import httptools

from citadel_supervisor.errors import UpstreamError, UpstreamLost

Headers = list[tuple[bytes, bytes]]

MOST_UNREAD = 256 * 1024
"""Bytes of an answer that may wait for their reader before the engine's connection is paused."""
SLICE = 256 * 1024
"""A request body goes out in slices of this size, each when the one before has left."""
SMALL = 64 * 1024
"""A body up to this size is sent together with its head."""


class Exchange:
    """One request and its answer. Made by `UpstreamPool.send`; used by one task.

    `status` is 0 and `headers` (names in lower case) are empty until the head of the answer is here.
    `error` is set once the answer can never be complete.
    """

    __slots__ = (
        "_bodyless", "_chunks", "_complete", "_connecting", "_connection", "_waiter",
        "address", "body", "error", "head", "headers", "status", "unread",
    )  # fmt: skip

    def __init__(self, address: str, head: bytes, body: bytes, bodyless: bool) -> None:
        self.address = address
        self.head = head
        self.body = body
        self.status = 0
        self.headers: Headers = []
        self.error: UpstreamError | None = None
        self.unread = 0
        """Bytes received and not read yet."""
        self._bodyless = bodyless
        self._chunks: list[bytes] = []
        self._complete = False
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether the whole answer has come and been read."""
        return self._complete and not self._chunks

    async def start(self) -> None:
        """Wait for the head of the answer. Raises UpstreamRefused and UpstreamLost."""
        while not self.status:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def read(self) -> bytes:
        """The bytes of the body that have come since the last call, at least one; b"" at its end.

        Raises UpstreamLost, after the last bytes that did come.
        """
        while not self._chunks:
            if self.error is not None:
                raise self.error
            if self._complete:
                return b""
            await self._wait()
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self.unread = 0
        if self._connection is not None:
            self._connection.resume()
        return data

    def abort(self) -> None:
        """Close the connection now, which is how an engine learns to stop; nothing after the end."""
        self.fail(UpstreamLost("the request was given up"))

    def fail(self, error: UpstreamError) -> None:
        """End it with `error` unless it has ended; its connection is closed now."""
        if self._complete or self.error is not None:
            return
        self.error = error
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._connection is not None:
            self._connection.leave()
            self._connection = None
        self._wake()

    # What connections and the pool tell it.

    def connecting(self, task: asyncio.Task[None]) -> None:
        self._connecting = task

    def carried_by(self, connection: Connection) -> None:
        self._connecting = None
        self._connection = connection

    def head_came(self, status: int, headers: Headers) -> bool:
        """Take the head; True if no body follows whatever the headers say."""
        self.headers = headers
        self.status = status
        self._wake()
        return self._bodyless

    def body_came(self, data: bytes) -> None:
        self._chunks.append(data)
        self.unread += len(data)
        self._wake()

    def completed(self) -> None:
        self._complete = True
        self._connection = None
        self._wake()

    def orphaned(self) -> None:
        """Its connection is gone; another may carry it."""
        self._connection = None

    async def _wait(self) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        await waiter

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


class Keeper(Protocol):
    """What a connection needs of the pool it belongs to."""

    def keep(self, connection: Connection) -> bool:
        """Take back a connection whose exchange is over; False if it is not wanted."""
        ...

    def drop(self, connection: Connection) -> None:
        """Forget an idle connection that is gone."""
        ...

    def connect(self, exchange: Exchange) -> None:
        """Carry `exchange` on a new connection."""
        ...


class Connection(asyncio.Protocol):
    """One connection to an engine. Carries one exchange at a time."""

    __slots__ = (
        "_answered", "_dirty", "_exchange", "_gone", "_headers", "_interim", "_keep", "_over",
        "_parser", "_pool", "_read_paused", "_reused", "_transport", "_unsent", "_write_paused",
        "address", "home",
    )  # fmt: skip

    def __init__(self, pool: Keeper, address: str, home: list[Connection]) -> None:
        self.address = address
        self.home = home
        """The pool's list of idle connections it belongs to; replaced there when the address is forgotten."""
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._headers: Headers = []
        self._unsent: memoryview | None = None
        self._gone = self._reused = False
        self._answered = self._interim = self._over = self._keep = self._dirty = False
        self._read_paused = self._write_paused = False

    def carry(self, exchange: Exchange, reused: bool) -> None:
        """Send the exchange's request and take its answer."""
        self._exchange = exchange
        self._reused = reused
        self._answered = self._interim = self._over = self._keep = False
        exchange.carried_by(self)
        body = exchange.body
        if len(body) <= SMALL:
            self._transport.write(exchange.head + body)
        else:
            self._transport.write(exchange.head)
            self._unsent = memoryview(body)
            self._pump()

    @property
    def usable(self) -> bool:
        return not self._gone and not self._transport.is_closing()

    def resume(self) -> None:
        """Its reader has caught up."""
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()

    def leave(self) -> None:
        """Nobody wants its answer any more: close at once."""
        self._exchange = None
        self._unsent = None
        self._transport.abort()

    # asyncio's callbacks.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # bytes that nobody asked for
            self._transport.abort()
            return
        self._answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._dirty = True
            if not self._over:
                exchange.fail(UpstreamLost(f"the engine's answer is not valid HTTP: {error}"))
                return
        if self._over:
            self._finish(exchange)
        elif exchange.unread > MOST_UNREAD and not self._read_paused:
            self._read_paused = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._unsent = None
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            self._pool.drop(self)
            return
        exchange.orphaned()
        if exc is None and exchange.status and _ends_with_connection(exchange.headers):
            exchange.completed()
        elif self._reused and not self._answered:
            # Closed by the engine while the request was on its way, as it does with an idle connection.
            self._pool.connect(exchange)
        else:
            why = f": {exc}" if exc is not None else ""
            exchange.fail(
                UpstreamLost(f"the engine closed the connection before its answer was complete{why}")
            )

    # httptools' callbacks.

    def on_message_begin(self) -> None:
        if self._over:
            self._dirty = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, []
        status = self._parser.get_status_code()
        self._interim = status < 200
        exchange = self._exchange
        if (
            exchange is not None
            and not self._interim
            and not self._over
            and exchange.head_came(status, headers)
        ):
            self._over = True
            self._dirty = True  # the parser, not told of HEAD, waits for a body

    def on_body(self, data: bytes) -> None:
        if self._exchange is not None and not self._over:
            self._exchange.body_came(data)

    def on_message_complete(self) -> None:
        if not self._interim and not self._over:
            self._over = True
            self._keep = self._parser.should_keep_alive()

    def _pump(self) -> None:
        while self._unsent is not None and not self._write_paused:
            self._transport.write(self._unsent[:SLICE])
            self._unsent = self._unsent[SLICE:] if len(self._unsent) > SLICE else None

    def _finish(self, exchange: Exchange) -> None:
        """The answer is complete: hand it over, keep the connection if it is clean."""
        self._exchange = None
        exchange.completed()
        if self._dirty or not self._keep or self._unsent is not None or not self._pool.keep(self):
            self._unsent = None
            self._transport.abort()
        else:
            self.resume()


def _ends_with_connection(headers: Headers) -> bool:
    """Whether the body of an answer with `headers` ends where the connection does."""
    coding = b""
    for name, value in headers:
        if name == b"content-length":
            return False
        if name == b"transfer-encoding":
            coding = value
    return coding.rpartition(b",")[2].strip().lower() != b"chunked"
