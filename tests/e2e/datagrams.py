"""The other end of systemd's notification socket."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path


class Notifications:
    """Receives what a daemon tells systemd, in order. Closed by `close`."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self.seen: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(address))

    async def until(self, wanted: str, seconds: float = 30.0) -> int:
        """Receive until a message that begins with `wanted` has come; its place among all."""
        async with asyncio.timeout(seconds):
            while True:
                for place, message in enumerate(self.seen):
                    if message.startswith(wanted):
                        return place
                await self._receive()

    async def count(self, wanted: str, number: int, seconds: float = 30.0) -> None:
        """Receive until that many messages that begin with `wanted` have come."""
        async with asyncio.timeout(seconds):
            while sum(message.startswith(wanted) for message in self.seen) < number:
                await self._receive()

    async def _receive(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self._socket, 4096)
        self.seen.append(data.decode())

    def close(self) -> None:
        self._socket.close()
