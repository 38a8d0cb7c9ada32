"""The control server: the unix socket, who may connect to it, and the HTTP server on it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from citadel_supervisor.control.app import ControlApp
from citadel_supervisor.control.peers import Gate, peer_of
from citadel_supervisor.control.protocol import ErrorCode, SupervisorApi, error_body
from citadel_supervisor.errors import AlreadyRunning, StartError
from citadel_supervisor.events import Event

MODE = 0o660
MAX_CONNECTIONS = 64
MAX_HEAD = 16 * 1024
"""Request line and headers, in bytes."""
_MAX_MESSAGE = 1024 * 1024
"""A client that goes on past this is cut off; it had its answer long before."""
MAX_PIPELINED = 16
"""Requests that one connection may send ahead of their answers."""
_HEAD_DEADLINE_S = 10.0
_LINGER_S = 1.0
"""How long a refused client may take to read why."""
PATH_BYTES = 107
"""What the kernel's sockaddr_un holds."""


def bind_control_socket(path: Path, group: str | None = None) -> socket.socket:
    """A listening socket at `path` with mode 0660, owned by `group` if given.

    Replaces the socket of a daemon that is dead. Raises AlreadyRunning where one is alive, StartError
    where `path` cannot be bound, ConfigError for a group this host does not have. Makes the directory
    (0755) if it is missing. `ControlServer.stop` removes the socket.
    """
    gate = Gate.for_group(group)
    if len(os.fsencode(path)) > PATH_BYTES:
        raise StartError(
            f"control socket {path}: a socket's path has at most {PATH_BYTES} bytes; shorten runtime_dir"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _remove_dead(path)
        sock.bind(os.fspath(path))
        # Nobody can connect before listen(), so the mode is in force before it matters.
        os.chmod(path, MODE)
        if gate.gid is not None:
            os.chown(path, -1, gate.gid)
        sock.listen(MAX_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise StartError(f"control socket {path}: {error.strerror}") from error
    except StartError:
        sock.close()
        raise
    return sock


def _remove_dead(path: Path) -> None:
    """Unlink a socket file that nobody listens on. Raises AlreadyRunning and StartError."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartError(f"control socket {path}: something else is there and is not overwritten; move it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:  # its queue of connections is full: alive, and its pid unknown
            raise AlreadyRunning(os.fspath(path.parent), "unknown") from None
        raise AlreadyRunning(os.fspath(path.parent), str(peer_of(probe.fileno()).pid))


class _Config(uvicorn.Config):
    def __init__(self, app: ASGIApp, gate: Gate, grace_s: int) -> None:
        self.gate = gate
        self.turned_away: set[ControlProtocol] = set()
        """Connections that were refused and still may read why."""
        # uvicorn would write a line for each piece of garbage, and past the daemon's own log at that.
        self.logger = logging.getLogger("citadel_supervisor.control.http")
        self.logger.setLevel(logging.ERROR)
        super().__init__(
            cast("Any", app),  # the two packages spell the type of an ASGI application differently
            http=ControlProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            workers=1,
            backlog=MAX_CONNECTIONS,
            timeout_graceful_shutdown=grace_s,
        )


class _Server(uvicorn.Server):
    """uvicorn without its main loop: no signal handlers, no ten wake-ups a second."""

    async def open(self, sock: socket.socket) -> None:
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(sockets=[sock])

    async def close(self, sock: socket.socket) -> None:
        await self.shutdown(sockets=[sock])


class ControlProtocol(HttpToolsProtocol):
    """One connection: admits the peer, and bounds what uvicorn leaves unbounded.

    uvicorn limits neither the size of a request's head, nor the time it may take, nor how many requests
    wait behind one that is being answered (30 MB/s of them filled 500 MB and held the event loop for
    seconds), and it collects them all in memory.
    """

    def __init__(
        self,
        config: _Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = config.logger
        self._gate = config.gate
        self._turned_away = config.turned_away
        self._refused = False
        self._in_head = True
        self._unfinished = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        crowded = len(self.connections) >= MAX_CONNECTIONS
        super().connection_made(transport)
        try:
            peer = peer_of(transport.get_extra_info("socket").fileno())
        except OSError:  # gone already
            transport.abort()
            return
        if not self._gate.admits(peer):
            # Never counted among the connections, or a stranger could take every place.
            self.connections.discard(self)
            self._refuse(HTTPStatus.FORBIDDEN, ErrorCode.FORBIDDEN, self._gate.refusal(peer))
        elif crowded:
            self.connections.discard(self)
            message = f"more than {MAX_CONNECTIONS} connections to the control socket"
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, ErrorCode.BUSY, message)
        else:
            self.app_state = {**self.app_state, "peer": peer}
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        self._unfinished += len(data)
        if self._refused:
            if self._unfinished > _MAX_MESSAGE:
                self.transport.abort()
            return
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._unfinished > MAX_HEAD:
            message = f"the request's head is larger than {MAX_HEAD} bytes"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, ErrorCode.TOO_LARGE, message)
        elif self._unfinished > _MAX_MESSAGE:
            self.transport.close()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests ahead of their answers")  # the parser makes it a 400
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._cancel_deadline()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._unfinished = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._turned_away.discard(self)
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_DEADLINE_S, self._head_is_late)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_is_late(self) -> None:
        message = f"no request arrived within {_HEAD_DEADLINE_S:g} s"
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, ErrorCode.TIMEOUT, message)

    def _refuse(self, status: HTTPStatus, code: ErrorCode, message: str) -> None:
        """Answer without a request, then end: at once where an answer is under way already.

        Closing with input unread would reset the connection and could take the answer with it, so the
        client gets a moment to send, read and leave; what it sends is dropped.
        """
        self._refused = True
        self._cancel_deadline()
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None and not cycle.response_complete:
            self.transport.close()
            return
        body = json.dumps(error_body(code, message)).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if len(self._turned_away) >= MAX_CONNECTIONS:
            self.transport.close()
            return
        self._turned_away.add(self)
        try:
            self.transport.write_eof()
        except OSError:
            self.transport.abort()
            return
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.abort)


class ControlServer:
    """Serves `api` on a socket of `bind_control_socket`, from `start` to `stop`."""

    def __init__(
        self,
        api: SupervisorApi,
        sock: socket.socket,
        *,
        gate: Gate,
        publish: Callable[[Event], None],
        log_poll_s: float = 0.25,
        grace_s: int = 2,
    ) -> None:
        """`publish` gets an `Audit` for every command; `grace_s` bounds `stop`."""
        self._sock = sock
        self._path = Path(sock.getsockname())
        self._file = self._path.stat()
        self._stopping = asyncio.Event()
        app = ControlApp(api, publish, self._stopping, log_poll_s).asgi()
        self._server = _Server(_Config(app, gate, grace_s))

    async def start(self) -> None:
        """Serve. Returns when connections are accepted; never blocks."""
        await self._server.open(self._sock)

    async def stop(self) -> None:
        """End streams cleanly, answer waiting commands with 503, close, and remove the socket's file.

        Takes `grace_s` seconds at most, and some tenths. The file stays if it is another daemon's by now.
        """
        self._stopping.set()
        try:
            now = self._path.stat()
            if (now.st_dev, now.st_ino) == (self._file.st_dev, self._file.st_ino):
                self._path.unlink()
        except FileNotFoundError:
            pass
        if self._server.started:
            await self._server.close(self._sock)
        self._sock.close()
