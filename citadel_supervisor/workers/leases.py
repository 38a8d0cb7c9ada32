"""Who uses the present generation: one lease a request in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from citadel_supervisor.workers.generation import Generation


class WorkerLease:
    """The use of one generation for one request; see gateway.backend.Lease."""

    __slots__ = ("_held_by", "_used", "address", "generation", "lost")

    def __init__(self, used: Generation, held_by: Leases) -> None:
        self.generation = used.spec.generation
        self.address = used.spec.socket
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._used = used
        self._held_by = held_by

    def alive(self) -> bool:
        return not self.lost.done() and self._used.alive()

    def release(self) -> None:
        self._held_by.release(self)


class Leases:
    """The leases of one worker. `on_idle` is called each time the last one is released."""

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self._held: set[WorkerLease] = set()
        self._on_idle = on_idle

    def __len__(self) -> int:
        return len(self._held)

    def add(self, generation: Generation) -> WorkerLease:
        """One more use of `generation`."""
        lease = WorkerLease(generation, self)
        self._held.add(lease)
        return lease

    def release(self, lease: WorkerLease) -> None:
        """End a use; a second call does nothing."""
        if lease in self._held:
            self._held.discard(lease)
            lease.lost.cancel()
            if not self._held:
                self._on_idle()

    def cut(self, reason: str) -> None:
        """Tell every holder that its generation is lost."""
        for lease in self._held:
            if not lease.lost.done():
                lease.lost.set_result(reason)
