"""The listening sockets: bound once, before any worker exists, and kept for the daemon's life."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import PortTaken, StartError

BACKLOG = 2048
LONGEST_COMMAND = 80
HIDDEN = "another process (not visible to this user)"


@dataclass(frozen=True, slots=True)
class BoundPorts:
    """Listening sockets by purpose. Connections queue in them until a server accepts."""

    router: socket.socket
    metrics: socket.socket
    health: socket.socket
    models: dict[str, socket.socket]

    def __iter__(self) -> Iterator[socket.socket]:
        yield from (self.router, self.metrics, self.health, *self.models.values())

    def close(self) -> None:
        """Close them all; a second call does nothing."""
        for sock in self:
            sock.close()


def port_number(sock: socket.socket) -> int:
    """The port that `sock` is bound to."""
    number: int = sock.getsockname()[1]
    return number


def bind_all(settings: Settings) -> BoundPorts:
    """Bind and listen on every port of `settings`; port 0 takes any free one.

    Blocks for a look-up if the host is a name. Raises PortTaken, or StartError for an address that cannot
    be had; nothing stays bound then.
    """
    gateway = settings.gateway
    with contextlib.ExitStack() as undo:

        def bound(port: int, purpose: str) -> socket.socket:
            return undo.enter_context(_bind(gateway.host, port, purpose))

        ports = BoundPorts(
            router=bound(gateway.router_port, "the router"),
            metrics=bound(gateway.metrics_port, "metrics"),
            health=bound(gateway.health_port, "health"),
            models={name: bound(model.port, f"model '{name}'") for name, model in settings.models.items()},
        )
        undo.pop_all()
    return ports


def _bind(host: str, port: int, purpose: str) -> socket.socket:
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise StartError(f"cannot bind {shown} for {purpose}: {error.strerror}; check gateway.host") from None
    sock = socket.socket(family, kind, protocol)
    try:
        # Without it a restart would wait for the last run's connections to time out. Two live listeners
        # still exclude each other.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(shown, purpose, _holder_of(port)) from None
        raise StartError(f"cannot bind {shown} for {purpose}: {error.strerror}; {_advice(error)}") from None
    return sock


def _advice(error: OSError) -> str:
    if error.errno == errno.EACCES:
        return "ports below 1024 need the capability CAP_NET_BIND_SERVICE"
    return "check gateway.host"


def _holder_of(port: int) -> str:
    """Who listens on `port`, for instance "pid 12 (nginx -g daemon)"."""
    try:
        listeners = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return HIDDEN
    for listener in listeners:
        if listener.status == psutil.CONN_LISTEN and listener.laddr[1:] == (port,) and listener.pid:
            return f"pid {listener.pid} ({_command_of(listener.pid)})"
    return HIDDEN


def _command_of(pid: int) -> str:
    """The beginning of the command line of `pid`."""
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
    except (psutil.Error, OSError):
        return "unknown command"
    return command if len(command) <= LONGEST_COMMAND else command[:LONGEST_COMMAND] + "…"
