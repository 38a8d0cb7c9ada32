"""uvicorn's HTTP on the gateway's sockets, without uvicorn's process: no signals, no lifespan, no tasks.

`ClientConnection` adds to uvicorn's connection what ASGI has no word for: a callback when the client
leaves, and an answer that ends visibly unfinished. It leans on `_start_asgi_task`, `cycle`, `flow` and
`send_400_response` of uvicorn's httptools protocol; the tests of the relay fail if those change.
"""

from __future__ import annotations

import asyncio
import time
from asyncio.base_events import Server
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, cast

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from citadel_supervisor.gateway.envelope import Failure, encode
from citadel_supervisor.gateway.sockets import BACKLOG, BoundPorts

LARGEST_HEAD = 16 * 1024
"""Bytes of a request's target and headers."""
MOST_HEADERS = 100
INTERIM = b"HTTP/1.1 100 "

BAD_HTTP = Failure(400, "the request is not valid HTTP", "invalid_http")
HEAD_TOO_LARGE = Failure(
    431, f"the request's headers exceed {LARGEST_HEAD} bytes or {MOST_HEADERS} lines", "headers_too_large"
)


class _HeadTooLarge(Exception):
    """Stops the parser."""


class _JoinedHead:
    """The transport of one answer: its head waits for the first bytes of its body.

    Both then leave in one packet and by one system call, which is a tenth of what a short answer costs.
    """

    __slots__ = ("_begun", "_head", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self._begun = False
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if self._begun:
            self._transport.write(data)
        elif self._head:
            self._begun = True
            self._transport.write(self._head + data)
        elif data.startswith(INTERIM):
            self._transport.write(data)
        else:
            self._head = data

    def flush(self) -> None:
        """Send the head of an answer that has no body."""
        if not self._begun and self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()


class ClientConnection(HttpToolsProtocol):
    """A client's connection; see gateway.asgi.Client. Requests find it in `scope["state"]["client"]`."""

    def __init__(self, config: Config, server_state: ServerState, closed: Callable[[], None]) -> None:
        super().__init__(config, server_state, {"client": self})
        self.left = False
        self._closed = closed
        self._active: RequestResponseCycle | None = None
        self._answer: _JoinedHead | None = None
        self._on_leave: Callable[[], object] | None = None
        self._in_head = False
        self._head_bytes = 0
        """What the present head can have had so far at most."""
        self._head_refused = False

    # gateway.asgi.Client

    @property
    def answered(self) -> bool:
        return self._active is not None and self._active.response_started

    def watch(self, on_leave: Callable[[], object] | None) -> None:
        self._on_leave = on_leave
        if on_leave is None:
            return
        if self.left:
            on_leave()
        elif not self.pipeline:
            # A large body pauses reading until somebody asks for more; unread, the end goes unnoticed.
            self.flow.resume_reading()

    def cut(self) -> None:
        if self._active is not None:
            self._active.disconnected = True  # uvicorn would log an answer that is left unfinished
        if self._answer is not None:
            self._answer.flush()
        self.transport.close()

    # What uvicorn calls.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        self._answer = _JoinedHead(self.transport)
        cycle.transport = cast(asyncio.Transport, self._answer)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self._answer is not None:
            self._answer.flush()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.left = True
        if self._active is not None:
            self._active.disconnected = True
        super().connection_lost(exc)
        on_leave, self._on_leave = self._on_leave, None
        if on_leave is not None:
            on_leave()
        self._closed()

    def data_received(self, data: bytes) -> None:
        self._head_bytes = self._head_bytes + len(data) if self._in_head else len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > LARGEST_HEAD and not self.transport.is_closing():
            self._head_refused = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.headers) > MOST_HEADERS or self._head_size() > LARGEST_HEAD:
            self._head_refused = True
            raise _HeadTooLarge
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read as a request, and close. An answer under way is cut, not added to."""
        if self.answered and self._active is not None and not self._active.response_complete:
            self.cut()
            return
        failure = HEAD_TOO_LARGE if self._head_refused else BAD_HTTP
        body = encode(failure, "")
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[failure.status] + head % len(body) + body)
        self.transport.close()

    def _head_size(self) -> int:
        """Bytes of the present head; not counted where it cannot matter, being one of few bytes received."""
        if self._head_bytes <= LARGEST_HEAD:
            return self._head_bytes
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)


class DataServer:
    """Serves `app` on the bound ports, by the running event loop."""

    def __init__(self, app: ASGIApp, ports: BoundPorts, keep_alive_s: float) -> None:
        self._ports = ports
        self._config = Config(
            app,
            http=ClientConnection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=max(1, round(keep_alive_s)),
        )
        self._state = ServerState()
        self._servers: list[Server] = []
        self._clock: asyncio.TimerHandle | None = None
        self._all_closed: asyncio.Future[None] | None = None

    @property
    def connections(self) -> int:
        """Clients connected now."""
        return len(self._state.connections)

    async def start(self) -> None:
        """Accept connections. Returning means accepting."""
        loop = asyncio.get_running_loop()
        self._config.load()
        self._tick()
        for sock in self._ports:
            self._servers.append(await loop.create_server(self._connection, sock=sock, backlog=BACKLOG))

    async def stop(self, grace_s: float = 5.0) -> None:
        """Close the ports, and each connection once it is idle; after `grace_s` seconds, whatever is left."""
        for server in self._servers:
            server.close()
        self._ports.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if not await self._until_closed(grace_s):
            for connection in list(self._state.connections):
                connection.transport.abort()
            await self._until_closed(grace_s)
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=grace_s)
        if self._clock is not None:
            self._clock.cancel()

    def _connection(self) -> ClientConnection:
        return ClientConnection(self._config, self._state, self._one_closed)

    def _one_closed(self) -> None:
        waiting = self._all_closed
        if waiting is not None and not waiting.done() and not self._state.connections:
            waiting.set_result(None)

    async def _until_closed(self, timeout_s: float) -> bool:
        if self._state.connections:
            self._all_closed = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._all_closed], timeout=timeout_s)
        return not self._state.connections

    def _tick(self) -> None:
        """Renew the Date header that all answers share, once a second."""
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        self._clock = asyncio.get_running_loop().call_later(1.0, self._tick)
