"""What happened, as frozen records, and the one place they pass through.

Metrics, logs, `citadelctl events` and later stores all consume these records; nothing below them
imports a metrics or log library on their account. Times are seconds since the epoch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from citadel_supervisor.states import WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A worker moved from one state to another."""

    kind: ClassVar[str] = "transition"
    model: str
    generation: int
    before: WorkerState
    after: WorkerState
    reason: str = ""
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited:
    """A process of a worker ended. `status` is an exit code, or minus the signal's number."""

    kind: ClassVar[str] = "exit"
    model: str
    generation: int
    part: str
    pid: int
    status: int
    expected: bool
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDone:
    """A relayed request ended. `status` is the HTTP status sent, 499 when the client left first.

    Durations are seconds; `first_byte_s` runs from arrival to the first byte of the body and is None
    when there was none. `attempts` counts engine generations tried.
    """

    kind: ClassVar[str] = "request"
    request_id: str
    model: str
    endpoint: str
    status: int
    duration_s: float
    first_byte_s: float | None
    generation: int
    attempts: int
    streamed: bool
    waited_s: float = 0.0
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """An operator did something over the control socket."""

    kind: ClassVar[str] = "audit"
    uid: int
    pid: int
    action: str
    target: str
    outcome: str
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something an operator should know that is none of the above."""

    kind: ClassVar[str] = "notice"
    level: str
    text: str
    model: str = ""
    at: float = field(default_factory=time.time)


Event = Transition | WorkerExited | RequestDone | Audit | Notice


def as_dict(event: Event) -> dict[str, Any]:
    """The event as JSON-ready data, with its `kind` first."""
    return {"kind": event.kind, **asdict(event)}


class EventBus:
    """Hands each event to every consumer and keeps the last `keep` that are not requests.

    Consumers are called in the publisher's turn of the event loop and must not block; one that
    raises is reported to `on_error` and the others still get the event.
    """

    def __init__(self, keep: int = 1000, on_error: Callable[[Exception], None] | None = None) -> None:
        self._recent: deque[Event] = deque(maxlen=keep)
        self._consumers: list[Callable[[Event], None]] = []
        self._on_error = on_error

    def publish(self, event: Event) -> None:
        """Record `event` and hand it on. Never blocks and never raises."""
        if not isinstance(event, RequestDone):
            self._recent.append(event)
        for consumer in tuple(self._consumers):
            try:
                consumer(event)
            except Exception as error:
                if self._on_error is not None:
                    self._on_error(error)

    def subscribe(self, consumer: Callable[[Event], None]) -> Callable[[], None]:
        """Call `consumer` with every event from now on; the result ends that."""
        self._consumers.append(consumer)
        return lambda: self._consumers.remove(consumer)

    def recent(self) -> list[Event]:
        """The kept events, oldest first."""
        return list(self._recent)

    async def follow(self, limit: int = 1000) -> AsyncIterator[Event]:
        """Every event from now on but requests; a reader that is `limit` behind loses the oldest."""
        pending: deque[Event] = deque(maxlen=limit)
        wake = asyncio.Event()

        def consumer(event: Event) -> None:
            if not isinstance(event, RequestDone):
                pending.append(event)
                wake.set()

        unsubscribe = self.subscribe(consumer)
        try:
            while True:
                await wake.wait()
                wake.clear()
                while pending:
                    yield pending.popleft()
        finally:
            unsubscribe()
