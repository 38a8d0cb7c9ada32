"""The pool of connections to the engines, kept alive between requests.

An address is the path of a unix socket ("/run/…") or "host:port".
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from citadel_supervisor.errors import UpstreamLost, UpstreamRefused
from citadel_supervisor.gateway.exchange import Connection, Exchange

BUSY_PAUSE_S = 0.01
"""Between tries when a unix socket's queue of new connections is full: the engine is busy, not gone."""


class UpstreamPool:
    """Connections to engines, kept between requests: at most `max_idle` idle ones an address."""

    def __init__(self, *, max_idle: int = 256, connect_timeout_s: float = 5.0) -> None:
        self._max_idle = max_idle
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[str, list[Connection]] = {}
        self._closed = False

    def send(
        self, address: str, method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> Exchange:
        """Send a request now, or as soon as a connection is made; does not block.

        `headers` lack Host and Content-Length, which are added. What goes wrong is raised by the
        exchange. An idle connection that turns out to be closed is replaced, once, unseen.
        """
        exchange = Exchange(
            address, _request_head(address, method, target, headers, body), body, method == b"HEAD"
        )
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            if connection.usable:
                connection.carry(exchange, reused=True)
                return exchange
        self.connect(exchange)
        return exchange

    def idle(self, address: str) -> int:
        """How many connections to `address` wait for a request."""
        return len(self._idle.get(address, ()))

    def forget(self, address: str) -> None:
        """Close the idle connections to `address`, and those in use once their answers are complete."""
        for connection in self._idle.pop(address, ()):
            connection.leave()

    def close(self) -> None:
        """Keep no connection from now on."""
        self._closed = True
        for address in list(self._idle):
            self.forget(address)

    # For exchanges and connections.

    def connect(self, exchange: Exchange) -> None:
        """Carry `exchange` on a new connection."""
        exchange.connecting(asyncio.get_running_loop().create_task(self._connect(exchange)))

    def keep(self, connection: Connection) -> bool:
        """Take back a connection; False if it is not wanted."""
        idle = connection.home
        if self._closed or len(idle) >= self._max_idle or self._idle.get(connection.address) is not idle:
            return False
        idle.append(connection)
        return True

    def drop(self, connection: Connection) -> None:
        """An idle connection is gone."""
        if connection in connection.home:
            connection.home.remove(connection)

    async def _connect(self, exchange: Exchange) -> None:
        address = exchange.address
        home = self._idle.setdefault(address, [])
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await self._dial(address, home)
        except OSError as error:  # TimeoutError is one
            why = error.strerror or str(error) or "no answer"
            exchange.fail(UpstreamRefused(f"no connection to the engine at {address}: {why}"))
        else:
            if exchange.error is not None:
                connection.leave()
            elif connection.usable:
                connection.carry(exchange, reused=False)
            else:
                exchange.fail(UpstreamLost("the engine closed the connection at once"))
        finally:
            # An address that leads nowhere leaves nothing behind; one in use is entered again.
            if not home and exchange.error is not None and self._idle.get(address) is home:
                del self._idle[address]

    async def _dial(self, address: str, home: list[Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        while True:
            try:
                if address.startswith("/"):
                    return (
                        await loop.create_unix_connection(lambda: Connection(self, address, home), address)
                    )[1]
                host, _, port = address.rpartition(":")
                return (
                    await loop.create_connection(lambda: Connection(self, address, home), host, int(port))
                )[1]
            except BlockingIOError:
                await asyncio.sleep(BUSY_PAUSE_S)


def _request_head(
    address: str, method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> bytes:
    host = b"localhost" if address.startswith("/") else address.encode()
    lines = [method + b" " + target + b" HTTP/1.1", b"host: " + host, b"content-length: %d" % len(body)]
    lines += [name + b": " + value for name, value in headers]
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    if head.count(b"\n") != len(lines) + 1 or head.count(b"\r") != len(lines) + 1:
        # The server's parser lets none through; were it to, a request could be smuggled inside another.
        raise ValueError("a header or the target holds a line break")
    return head
