"""Talking to systemd: readiness, a status line, and the watchdog. Nothing happens without it.

The protocol is one datagram a message to `$NOTIFY_SOCKET` (sd_notify(3)); the packages for it are
either unkept or need libsystemd's headers to install.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Mapping

MOST_UNSENT = 64
"""Messages that wait for a systemd that does not read; further ones are dropped."""


class Notifier:
    """Sends to the socket that systemd named in the environment, if any. Nothing here blocks."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.setblocking(False)
        self._unsent: deque[bytes] = deque()
        for_us = environment.get("WATCHDOG_PID") in (None, str(os.getpid()))
        microseconds = environment.get("WATCHDOG_USEC", "") if for_us else ""
        self._watchdog_s = int(microseconds) / 1e6 if microseconds.isdigit() else 0.0
        self._status = ""

    def ready(self) -> None:
        """Start-up is complete."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send("RELOADING=1")

    def stopping(self) -> None:
        """Shutting down begins."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows; sent only when it changed."""
        if text != self._status:
            self._status = text
            self._send(
                f"STATUS={' '.join(text.splitlines())}"
            )  # a further line would be a message of its own

    def extend(self, seconds: float) -> None:
        """Ask for more time: something slow is under way and moving."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    async def feed_watchdog(self) -> None:
        """Feed the watchdog from the event loop, twice a period, for ever; returns at once without one."""
        while self._watchdog_s:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 2)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        if len(self._unsent) < MOST_UNSENT:
            self._unsent.append(message.encode(errors="backslashreplace"))
        try:
            while self._unsent:
                self._socket.sendto(self._unsent[0], self._address)
                self._unsent.popleft()
        except BlockingIOError:
            pass  # the next message takes these along
        except OSError:
            self._unsent.clear()  # nobody is there
