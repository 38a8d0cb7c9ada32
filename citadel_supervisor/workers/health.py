"""Pure: what readings of one generation mean. A busy engine is fine, however slow; a stuck one is not.

The engine core is believed to work when it produces tokens or uses its cores. `/health` alone says
little: an engine core that is stopped or wedged keeps answering it through the API process.
"""

from __future__ import annotations

from dataclasses import dataclass

from citadel_supervisor.config import HealthSettings

CPU_SHARE = 0.02
"""Less than this share of one core is idling: timers and polls of an engine that does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look at a generation. `at` is monotonic seconds, `cpu_s` CPU seconds of the engine core."""

    at: float
    loading: bool
    work: int
    """Requests given to the engine and not answered yet."""
    cpu_s: float
    stopped: str = ""
    """Which part is stopped by a signal, "" for none."""
    marks: tuple[float, ...] = ()
    """Counters that move when the engine gets somewhere: tokens, bytes loaded."""
    failed_probes: int = 0


class Diagnosis:
    """Takes readings in order; `judge` says why the generation must be replaced, or None."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._last: Reading | None = None
        self._moved_at = 0.0
        self._busy_at = 0.0
        self._running_at = 0.0

    def judge(self, now: Reading) -> str | None:
        """The reason to replace the generation, in an operator's words, or None."""
        last, self._last = self._last, now
        if last is None:
            self._moved_at = self._busy_at = self._running_at = now.at
            return None
        if now.marks != last.marks or (not now.loading and not last.work) or now.loading != last.loading:
            self._moved_at = now.at
        if now.cpu_s - last.cpu_s >= CPU_SHARE * (now.at - last.at):
            self._busy_at = now.at
        if not now.stopped:
            self._running_at = now.at
        return self._verdict(now)

    def _verdict(self, now: Reading) -> str | None:
        limits = self._settings
        if now.failed_probes >= limits.failures:
            return f"hung: {now.failed_probes} health probes in a row failed"
        if now.at - self._running_at > limits.stall_s:
            return f"hung: the {now.stopped} has been stopped by a signal for {limits.stall_s:g} s"
        idle = now.at - max(self._moved_at, self._busy_at)
        if now.loading:
            if idle > limits.load_stall_s:
                return f"hung: loading made no progress and used no CPU for {limits.load_stall_s:g} s"
            return None
        if now.work and idle > limits.stall_s:
            return f"hung: no token and no CPU time for {limits.stall_s:g} s with {now.work} requests waiting"
        if now.work and now.at - self._moved_at > limits.spin_s:
            return (
                f"hung: no token for {limits.spin_s:g} s with {now.work} requests waiting, though it uses CPU"
            )
        return None
