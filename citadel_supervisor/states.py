"""The life of a worker: its states, the moves between them, and the snapshot others read.

A worker is the supervised engine of one model. A generation is one run of it, numbered from 1.
Only the worker's own task moves its state; everyone else reads a `WorkerSnapshot`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class WorkerState(StrEnum):
    """Where a worker is in its life."""

    STOPPED = "stopped"
    """No process, and none is wanted."""
    STARTING = "starting"
    """A process is being made."""
    LOADING = "loading"
    """The process runs and reads its weights; `Progress` comes from the engine."""
    VERIFYING = "verifying"
    """The engine serves on its private socket and answers the known-answer check."""
    READY = "ready"
    """Takes requests."""
    DRAINING = "draining"
    """Takes no new request; those in flight finish."""
    STOPPING = "stopping"
    """Its process tree is being ended."""
    FAILED = "failed"
    """The generation is lost; what is left of its tree is being ended."""
    BACKING_OFF = "backing_off"
    """Waits before the next generation."""
    QUARANTINED = "quarantined"
    """Not restarted: it can never start, or its restart budget is used up. An operator must act."""


S = WorkerState

TRANSITIONS: dict[WorkerState, frozenset[WorkerState]] = {
    S.STOPPED: frozenset({S.STARTING}),
    S.STARTING: frozenset({S.LOADING, S.FAILED, S.STOPPING}),
    S.LOADING: frozenset({S.VERIFYING, S.FAILED, S.STOPPING}),
    S.VERIFYING: frozenset({S.READY, S.FAILED, S.STOPPING}),
    S.READY: frozenset({S.DRAINING, S.FAILED}),
    S.DRAINING: frozenset({S.READY, S.STOPPING, S.FAILED}),
    S.STOPPING: frozenset({S.STOPPED, S.STARTING}),
    S.FAILED: frozenset({S.BACKING_OFF, S.QUARANTINED, S.STOPPED, S.STARTING}),
    S.BACKING_OFF: frozenset({S.STARTING, S.STOPPED}),
    S.QUARANTINED: frozenset({S.STARTING, S.STOPPED}),
}
"""Every allowed move. STOPPING and FAILED leave only when the process tree is gone."""

COMING_UP = frozenset({S.STARTING, S.LOADING, S.VERIFYING, S.FAILED, S.BACKING_OFF})
"""A request may wait: a generation that takes requests is on its way."""

SETTLED = frozenset({S.READY, S.STOPPED, S.QUARANTINED})
"""Nothing is under way."""

HAS_PROCESS = frozenset({S.STARTING, S.LOADING, S.VERIFYING, S.READY, S.DRAINING, S.STOPPING, S.FAILED})
"""A process tree of the worker may exist."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far loading is, as the engine itself reports it.

    `phase` is one of "process", "config", "weights", "kv_cache", "warm_up", "serving"; `done` and
    `total` are bytes of weights while the phase is "weights", else 0.
    """

    phase: str = ""
    done: int = 0
    total: int = 0

    def text(self) -> str:
        """Human form, for instance "weights 45 % (120 of 269 MB)"."""
        if not self.total:
            return self.phase.replace("_", " ")
        percent = 100 * self.done // self.total
        return f"{self.phase} {percent} % ({self.done // 10**6} of {self.total // 10**6} MB)"


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """What a worker is at one moment. Times are seconds since the epoch; sizes are bytes."""

    model: str
    state: WorkerState = S.STOPPED
    reason: str = ""
    since: float = 0.0
    generation: int = 0
    restarts: int = 0
    """Generations started after one that was lost, since the daemon began."""
    last_loss: str = ""
    """Why the last generation that was lost was lost."""
    pid: int | None = None
    """The API process of the present generation; `core_pid` is its engine core."""
    core_pid: int | None = None
    cpus: tuple[int, ...] = ()
    active_requests: int = 0
    waiting_requests: int = 0
    progress: Progress = field(default_factory=Progress)
    launch: str = ""
    """How the present generation was made: "zygote" or "spawn"."""
    ready_after_s: float | None = None
    """Seconds from the start of the present generation to ready; None before."""

    @property
    def ready(self) -> bool:
        return self.state is S.READY
