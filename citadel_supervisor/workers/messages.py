"""What can happen to a worker: everything that its task finds in its inbox."""

from __future__ import annotations

from dataclasses import dataclass

from citadel_supervisor.workers.generation import Occurrence


@dataclass(frozen=True, slots=True)
class Start:
    """An operator wants it running."""


@dataclass(frozen=True, slots=True)
class Stop:
    """It is to be stopped, or (`again`) stopped and started."""

    drain_s: float
    reason: str
    again: bool = False


@dataclass(frozen=True, slots=True)
class Drain:
    """An operator wants no new requests on it; the engine stays loaded."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A step of the generation, or a check of it, failed."""

    generation: int
    reason: str
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class Verified:
    """The known answer was right."""

    generation: int
    text: str


@dataclass(frozen=True, slots=True)
class DrainOver:
    """Nothing is in flight any more, or the drain's time is up."""

    generation: int


@dataclass(frozen=True, slots=True)
class Ended:
    """No process of the generation is left."""

    generation: int


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The pause before the next generation is over."""

    generation: int


Message = Start | Stop | Drain | Failed | Verified | DrainOver | Ended | RetryDue | Occurrence
