"""What the gateway needs of a worker, and no more.

A lease is the right to use one generation for one request. The worker counts its leases: it drains
by waiting until there are none.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from citadel_supervisor.states import WorkerSnapshot


class Lease(Protocol):
    """The use of one generation for one request."""

    @property
    def generation(self) -> int: ...

    @property
    def address(self) -> str:
        """The engine's HTTP address: the path of a unix socket, or "host:port"."""
        ...

    @property
    def lost(self) -> asyncio.Future[str]:
        """Done, with the reason, as soon as the generation is known to be lost."""
        ...

    def alive(self) -> bool:
        """Whether the generation's processes live, asked of the kernel now. Does not block."""
        ...

    def release(self) -> None:
        """End the use. A second call does nothing."""
        ...


class Backend(Protocol):
    """One model's worker as the gateway sees it."""

    def snapshot(self) -> WorkerSnapshot:
        """The worker at this moment."""
        ...

    async def lease(self, wait_s: float) -> Lease:
        """Use of the ready generation; waits up to `wait_s` seconds for one that is coming up.

        Returns at once when ready. Raises NotReady at once where waiting is useless (stopped,
        draining, quarantined, too many waiting already) and when the time is up.
        """
        ...
