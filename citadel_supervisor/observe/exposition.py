"""What a scrape is answered with: the supervisor's own series and the engines'."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from citadel_supervisor.errors import UpstreamError
from citadel_supervisor.observe.metrics import Metrics, label_engine_series
from citadel_supervisor.states import WorkerSnapshot, WorkerState

Ask = Callable[[str, str, str, bytes], Awaitable[tuple[int, bytes]]]

ENGINE_TIMEOUT_S = 2.0
"""An engine that does not tell its series within this time is left out of the scrape."""


class Scraped(Protocol):
    """What is asked of a worker."""

    def snapshot(self) -> WorkerSnapshot: ...

    @property
    def address(self) -> str | None:
        """The present generation's HTTP address, None without one."""
        ...


class Exposition:
    """Answers scrapes. An engine that is away or slow costs its own series, never the scrape."""

    def __init__(self, metrics: Metrics, workers: Mapping[str, Scraped], ask: Ask) -> None:
        self._metrics = metrics
        self._workers = workers
        self._ask = ask

    async def text(self, model: str | None) -> bytes:
        """One model's series and its engine's, or with None everything, engines' series labelled by model."""
        own = self._metrics.text(model)
        if model is not None:
            return own + (await self._engine(self._workers[model]) or b"")
        names = list(self._workers)
        answers = await asyncio.gather(*(self._engine(self._workers[name]) for name in names))
        texts = {
            (name, self._workers[name].snapshot().generation): answer.decode(errors="replace")
            for name, answer in zip(names, answers, strict=True)
            if answer is not None
        }
        return own + await asyncio.to_thread(label_engine_series, texts)

    async def _engine(self, worker: Scraped) -> bytes | None:
        serving = worker.snapshot().state in (WorkerState.READY, WorkerState.DRAINING)
        if not serving or worker.address is None:
            return None
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                status, body = await self._ask(worker.address, "GET", "/metrics", b"")
        except (UpstreamError, TimeoutError):
            return None
        return body if status == 200 else None
