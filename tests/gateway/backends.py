"""A worker as the gateway sees it, moved by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from dataclasses import replace

from citadel_supervisor.errors import NotReady
from citadel_supervisor.states import COMING_UP, Progress, WorkerSnapshot, WorkerState


class Watched(asyncio.Future[str]):
    """A future that counts who waits for it."""

    watchers = 0

    def add_done_callback(self, fn: Callable[..., object], *, context: Context | None = None) -> None:
        super().add_done_callback(fn, context=context)
        self.watchers += 1


class FakeLease:
    """The use of one generation; counted by its backend until released."""

    def __init__(self, backend: FakeBackend, generation: int, address: str) -> None:
        self.generation = generation
        self.address = address
        self.lost = Watched(loop=asyncio.get_running_loop())
        self._backend = backend

    def alive(self) -> bool:
        return self.generation not in self._backend.dead

    def release(self) -> None:
        self._backend.leases.discard(self)


class FakeBackend:
    """Implements gateway.backend.Backend. `dead` are the generations whose processes do not live."""

    def __init__(self, model: str) -> None:
        self.leases: set[FakeLease] = set()
        self.dead: set[int] = set()
        self.waiting = asyncio.Event()
        """Set once a request waits for a generation."""
        self.waited: list[float] = []
        """What each lease was allowed to wait, in seconds."""
        self._address = ""
        self._seen = WorkerSnapshot(model, state=WorkerState.STOPPED)
        self._changed = asyncio.Condition()
        self._waiting = 0

    @property
    def doubted(self) -> bool:
        """Whether somebody waits to hear that a generation is lost, besides the one who is to be told."""
        return any(lease.lost.watchers > 1 for lease in self.leases)

    def snapshot(self) -> WorkerSnapshot:
        return replace(self._seen, active_requests=len(self.leases), waiting_requests=self._waiting)

    async def lease(self, wait_s: float) -> FakeLease:
        self.waited.append(wait_s)
        self._waiting += 1
        try:
            async with asyncio.timeout(wait_s), self._changed:
                while not self._seen.ready:
                    if self._seen.state not in COMING_UP:
                        raise self._not_ready()
                    self.waiting.set()
                    await self._changed.wait()
        except TimeoutError:
            raise self._not_ready() from None
        finally:
            self._waiting -= 1
        lease = FakeLease(self, self._seen.generation, self._address)
        self.leases.add(lease)
        return lease

    async def up(self, address: str) -> None:
        """A new generation is ready at `address`."""
        self._address = address
        await self.become(WorkerState.READY, generation=self._seen.generation + 1)

    async def become(
        self,
        state: WorkerState,
        reason: str = "",
        generation: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        number = self._seen.generation if generation is None else generation
        async with self._changed:
            self._seen = replace(
                self._seen, state=state, reason=reason, generation=number, progress=progress or Progress()
            )
            self._changed.notify_all()

    async def lose(self, reason: str = "engine core killed") -> None:
        """The present generation is lost, and known to be; its leases hear of it."""
        await self.become(WorkerState.FAILED, reason)
        self.dead.add(self._seen.generation)
        for lease in list(self.leases):
            if not lease.lost.done():
                lease.lost.set_result(reason)

    def _not_ready(self) -> NotReady:
        return NotReady(self._seen.model, self._seen.state, self._seen.reason, 3.2)
