"""Reading lines from a pipe inside the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

OpenOutput = Callable[[str], Awaitable[int]]
"""`await open_output(name)`: a descriptor to which `name`'s processes print; the caller closes it."""

LINE_MAX = 16 * 1024
"""A longer line is handed on in pieces of this many bytes, so that memory stays bounded."""

READ_MAX = 64 * 1024
"""A pipe holds so much; after it others have their turn."""


async def read_lines(descriptor: int, on_line: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
    """Call `on_line` for every line written to the pipe (without its newline), then `on_end` once.

    Returns as soon as reading has begun, without a wait. Takes over `descriptor` and closes it at the end.
    """
    # Not connect_read_pipe: cancelled while it waits, it leaves open who closes the descriptor.
    _LineReader(descriptor, on_line, on_end)


class _LineReader:
    def __init__(self, descriptor: int, on_line: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_line = on_line
        self._on_end = on_end
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._descriptor, READ_MAX)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            lines, self._rest = [self._rest], b""
        cut = len(self._rest) // LINE_MAX * LINE_MAX
        lines, self._rest = [*lines, self._rest[:cut]], self._rest[cut:]
        try:
            for line in lines:
                for start in range(0, len(line), LINE_MAX):
                    self._on_line(line[start : start + LINE_MAX])
        finally:
            if not data:
                self._on_end()
