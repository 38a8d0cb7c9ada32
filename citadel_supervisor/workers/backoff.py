"""Pure: how long to wait before the next generation, and when to give up."""

from __future__ import annotations

from collections import deque

from citadel_supervisor.config import BackoffSettings


class RestartBudget:
    """Counts the generations lost within the window."""

    def __init__(self, settings: BackoffSettings) -> None:
        self._settings = settings
        self._lost: deque[float] = deque()

    @property
    def lost(self) -> int:
        """Generations lost within the window, as of the last `spend`."""
        return len(self._lost)

    def spend(self, now: float, draw: float) -> float | None:
        """A generation was lost at `now`: seconds to wait before the next, or None to give up.

        The first loss in a window costs no wait; then the waits grow. `draw` in [0, 1) is the jitter.
        """
        settings = self._settings
        self._lost.append(now)
        while self._lost[0] <= now - settings.window_s:
            self._lost.popleft()
        if len(self._lost) > settings.restarts:
            return None
        if len(self._lost) == 1:
            return 0.0
        try:
            pause = min(settings.initial_s * settings.factor ** (len(self._lost) - 2), settings.maximum_s)
        except OverflowError:  # a thousand losses within a long window
            pause = settings.maximum_s
        return pause * (1 + settings.jitter * (2 * draw - 1))
