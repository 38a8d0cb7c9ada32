"""An engine's HTTP side for tests: a real server on a unix socket whose answers the test gives step by step.

    async with FakeUpstream(path) as upstream:
        call = await upstream.call()          # the next request that arrived, whole
        call.head(200, chunked=True)
        call.chunk(b"data: {}\n\n")
        call.end()                            # or call.die(): the connection is cut as it is
        await call.gone()                     # the relay has closed the connection

With `upstream.answer` set, it is called with each request instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import cast

import httptools

Headers = list[tuple[bytes, bytes]]
SECONDS = 5.0
"""How long a test waits for anything before it fails."""


async def until(condition: Callable[[], bool]) -> None:
    """Give the event loop turns until `condition` holds; for what tells nobody when it changes."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0)


@contextlib.contextmanager
def full_queue(path: str) -> Iterator[None]:
    """A unix socket on which nobody accepts and the queue of new connections is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(path)
        full.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                caller = stack.enter_context(socket.socket(socket.AF_UNIX))
                caller.setblocking(False)
                caller.connect(path)
        yield


class Call:
    """One request, and the means to answer it."""

    def __init__(
        self, connection: _Connection, method: bytes, target: bytes, headers: Headers, body: bytes
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.connection = connection
        self._chunked = False

    def header(self, name: bytes) -> bytes | None:
        """The value of the request's header, None if it has none; more than one is an error."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) < 2, (name, values)
        return values[0] if values else None

    def head(self, status: int = 200, headers: Headers | None = None, chunked: bool = False) -> None:
        self._chunked = chunked
        lines = [b"HTTP/1.1 %d Whatever" % status]
        lines += [name + b": " + value for name, value in headers or []]
        if chunked:
            lines.append(b"Transfer-Encoding: chunked")
        self.raw(b"\r\n".join(lines) + b"\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.raw(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """End a chunked answer."""
        self.raw(b"0\r\n\r\n")

    def stream(self) -> None:
        """Begin a stream of events."""
        self.head(200, [(b"Content-Type", b"text/event-stream; charset=utf-8")], chunked=True)

    def reply(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """A whole answer at once."""
        own = [(b"Content-Length", b"%d" % len(body)), (b"Content-Type", b"application/json")]
        lines = [
            b"HTTP/1.1 %d Whatever" % status,
            *(name + b": " + value for name, value in own + (headers or [])),
        ]
        self.raw(b"\r\n".join(lines) + b"\r\n\r\n" + body)

    def raw(self, data: bytes) -> None:
        self.connection.transport.write(data)

    def die(self) -> None:
        """Cut the connection as it is, after what was written."""
        self.connection.transport.close()

    async def writable(self) -> None:
        """Wait until the relay has taken enough of what was written for more to be welcome."""
        async with asyncio.timeout(SECONDS):
            await self.connection.flowing.wait()

    async def gone(self) -> None:
        """Wait until the connection is closed."""
        async with asyncio.timeout(SECONDS):
            await self.connection.closed.wait()


class _Connection(asyncio.Protocol):
    def __init__(self, upstream: FakeUpstream) -> None:
        self._upstream = upstream
        self._parser = httptools.HttpRequestParser(self)
        self.closed = asyncio.Event()
        self.flowing = asyncio.Event()
        self.flowing.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._upstream.accepted(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.open.discard(self)
        self.closed.set()
        self.flowing.set()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        self.flowing.clear()

    def resume_writing(self) -> None:
        self.flowing.set()

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        call = Call(self, self._parser.get_method(), self._target, self._headers, b"".join(self._body))
        self._upstream.arrived(call)


class FakeUpstream:
    """The server. `requests` and `connections` count what came since it was made."""

    def __init__(self, path: str, backlog: int = 100) -> None:
        self.path = path
        self.requests = 0
        self.connections = 0
        self.open: set[_Connection] = set()
        self.answer: Callable[[Call], None] | None = None
        self._backlog = backlog
        self._calls: asyncio.Queue[Call] = asyncio.Queue()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FakeUpstream:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: _Connection(self), self.path, backlog=self._backlog
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Die: no listener, every connection cut, as when the process is killed."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.open):
            connection.transport.abort()
            await connection.closed.wait()

    def close_idle(self) -> None:
        """Close every connection, as a server does with those it thinks idle."""
        for connection in list(self.open):
            connection.transport.close()

    async def call(self) -> Call:
        """The next request."""
        async with asyncio.timeout(SECONDS):
            return await self._calls.get()

    @property
    def pending(self) -> int:
        """Requests that have arrived and that no test has taken."""
        return self._calls.qsize()

    def accepted(self, connection: _Connection) -> None:
        self.connections += 1
        self.open.add(connection)

    def arrived(self, call: Call) -> None:
        self.requests += 1
        if self.answer is not None:
            self.answer(call)
        else:
            self._calls.put_nowait(call)
