"""Reading lines from a pipe inside the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

OpenOutput = Callable[[str], Awaitable[int]]
"""`await open_output(name)`: a descriptor to which `name`'s processes print; the caller closes it."""

LINE_MAX = 16 * 1024
"""A longer line is handed on in pieces of this many bytes, so that memory stays bounded."""


async def read_lines(descriptor: int, on_line: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
    """Call `on_line` for every line written to the pipe (without its newline), then `on_end` once.

    Returns as soon as reading has begun. Takes over `descriptor` and closes it at the end.
    """
    loop = asyncio.get_running_loop()
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    await loop.connect_read_pipe(lambda: _LineProtocol(on_line, on_end), pipe)


class _LineProtocol(asyncio.Protocol):
    def __init__(self, on_line: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._on_line = on_line
        self._on_end = on_end
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line:
                self._on_line(line)
        while len(rest) > LINE_MAX:
            self._on_line(rest[:LINE_MAX])
            rest = rest[LINE_MAX:]
        self._rest = rest

    def connection_lost(self, error: Exception | None) -> None:
        if self._rest:
            self._on_line(self._rest)
        self._on_end()
