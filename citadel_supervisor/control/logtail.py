"""The end of a log file, and what is appended to it, through rotation; never the whole of it in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path

import anyio.to_thread

_BLOCK = 64 * 1024


def tail_offset(file: FileIO, lines: int) -> int:
    """Where the last `lines` lines of `file` begin, in bytes. Blocks; reads backwards by blocks."""
    end = file.seek(0, os.SEEK_END)
    if lines == 0:
        return end
    position, wanted = end, lines
    while position > 0:
        start = max(0, position - _BLOCK)
        block = os.pread(file.fileno(), position - start, start)
        # The newline that ends the last line begins no other.
        stop = len(block) - 1 if position == end and block.endswith(b"\n") else len(block)
        found = block.count(b"\n", 0, stop)
        if found >= wanted:
            for _ in range(wanted):
                stop = block.rindex(b"\n", 0, stop)
            return start + stop + 1
        wanted -= found
        position = start
    return 0


class LogFollower:
    """Reads `path` from its last `lines` lines on. Its methods block for one small read."""

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        self._lines: int | None = lines
        self._file: FileIO | None = None

    def read(self) -> bytes:
        """The next bytes, at most 64 KiB; none at the end, or while there is no such file."""
        if self._file is None and not self._open():
            return b""
        assert self._file is not None
        if data := self._file.read(_BLOCK):
            return data
        try:
            now = os.stat(self._path)
        except FileNotFoundError:  # rotated away; the next one is not there yet
            return b""
        mine = os.fstat(self._file.fileno())
        if (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino):
            if data := self._file.read(_BLOCK):  # written before the rotation, after the read above
                return data
            self._open()
        elif now.st_size < self._file.tell():  # cut in place
            self._file.seek(0)
        else:
            return b""
        return self._file.read(_BLOCK) or b""

    def _open(self) -> bool:
        """Open the file that has the name now: the first at its tail, a later one at its start."""
        try:
            file = FileIO(self._path)
        except FileNotFoundError:
            self._lines = None  # one that appears later is new as a whole
            return False
        self.close()
        self._file = file
        if self._lines is not None:
            file.seek(tail_offset(file, self._lines))
            self._lines = None
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


async def stream_log(
    path: Path, *, lines: int, follow: bool, stopping: asyncio.Event, poll_s: float
) -> AsyncIterator[bytes]:
    """The last `lines` lines of `path`, then, with `follow`, what is appended until `stopping` is set.

    Appended text appears within `poll_s` seconds. A missing file is empty, and followed when it comes.
    """
    follower = LogFollower(path, lines)
    try:
        while True:
            if data := await anyio.to_thread.run_sync(follower.read):
                yield data
                continue
            if not follow or stopping.is_set():
                return
            try:
                async with asyncio.timeout(poll_s):
                    await stopping.wait()
            except TimeoutError:
                pass
    finally:
        follower.close()
