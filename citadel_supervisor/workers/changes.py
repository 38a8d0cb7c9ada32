"""Waiting for a worker to change: requests for its next generation, operators for an outcome."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Changes:
    """Tells those who wait that something happened; each looks for itself whether it is what it waits for."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def tell(self) -> None:
        """Let everyone look again."""
        if self._next is not None and not self._next.done():
            self._next.set_result(None)

    async def until(self, condition: Callable[[], bool], wait_s: float | None = None) -> None:
        """Return once `condition` holds, which it does at the moment of return, or after `wait_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not condition():
                    if self._next is None or self._next.done():
                        self._next = asyncio.get_running_loop().create_future()
                    await asyncio.shield(self._next)  # shared: one that gives up must not cancel it
