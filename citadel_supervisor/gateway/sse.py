"""Server-sent events, as far as a relay must know them: where one ends, and what the last one was."""

from __future__ import annotations

import re

LONGEST_EVENT = 1024 * 1024
"""An event is held back until it is complete up to this many bytes."""

_SEQUENCE = re.compile(rb'"sequence_number":\s*(\d{1,18})')
_ERRORS = (b'data: {"error"', b"event: error\n")
_LAST_WORDS = (
    b"data: [DONE]",
    b"event: message_stop\n",
    b"event: response.completed\n",
    b"event: response.incomplete\n",
    b"event: response.failed\n",
)


class EventHold:
    """Passes on whole events as they come and holds back the beginning of the next.

    So that, when an engine dies in the middle of one, an error event can follow cleanly.
    """

    __slots__ = ("_held", "_last", "torn")

    def __init__(self) -> None:
        self._held = b""
        self._last = b""
        self.torn = False
        """An event grew too long to hold and was passed on unfinished: nothing can follow it cleanly."""

    def feed(self, data: bytes) -> bytes:
        """The whole events that have come, b"" if there are none yet."""
        if self._held:
            data = self._held + data
        end = _end_of_events(data)
        if end == len(data):
            self._held = b""
        elif len(data) - end <= LONGEST_EVENT:
            data, self._held = data[:end], data[end:]
        else:
            self._held = b""
            self.torn = True
        if data:
            self._last = data
        return data

    def rest(self) -> bytes:
        """What is held back, at the end of a stream that ended well."""
        held, self._held = self._held, b""
        return held

    @property
    def over(self) -> bool:
        """Whether the last event that was passed on ends the stream by itself or reports its failure."""
        last = self._last.replace(b"\r\n", b"\n").rstrip(b"\n").rpartition(b"\n\n")[2]
        return (last + b"\n").startswith(_LAST_WORDS + _ERRORS)

    @property
    def next_sequence(self) -> int:
        """One more than the last sequence number that was passed on; 0 if there was none."""
        numbers = _SEQUENCE.findall(self._last)
        return int(numbers[-1]) + 1 if numbers else 0


def report_error(events: bytes) -> bool:
    """Whether `events` begin with an error."""
    return events.startswith(_ERRORS)


def _end_of_events(data: bytes) -> int:
    """Where the last whole event in `data` ends; 0 if there is none."""
    if data.endswith(b"\n\n"):
        return len(data)
    plain = data.rfind(b"\n\n")
    with_returns = data.rfind(b"\r\n\r\n")
    return max(plain + 2 if plain >= 0 else 0, with_returns + 4 if with_returns >= 0 else 0)
