"""What a daemon could leave behind, seen before and after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import psutil

from tests.conftest import processes_of
from tests.e2e.daemon import Daemon

OTHERS = ("citadel-", "pytest-", "pip-", "bash_", "tmp.", "stock-bench-")
"""What other programs, other tests among them, put into /tmp meanwhile."""


def litter() -> set[str]:
    """Everything in the directories that engines are known to leave things in."""
    found = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    found |= {f"/tmp/{name}" for name in os.listdir("/tmp") if not name.startswith(OTHERS)}
    for place in Path("/tmp").glob("torchinductor_*"):
        with contextlib.suppress(OSError):
            found |= {str(path) for path in place.rglob("*")}
    return found


class Traces:
    """A running daemon's processes, and the litter there was before it did anything."""

    def __init__(self, daemon: Daemon, before: set[str]) -> None:
        self._daemon = daemon
        self._before = before
        self._tree = daemon.tree()

    async def gone(self, seconds: float = 5.0) -> float:
        """Wait until no process of it is left; the seconds it took. Fails when some are after `seconds`."""
        began = time.monotonic()
        while left := self.alive():
            assert time.monotonic() - began < seconds, f"left after {seconds:g} s: {left}"
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    def alive(self) -> list[str]:
        """The processes that live: of its tree when this was made, and all that carry its mark now."""
        marked = [_process(pid) for pid in processes_of(self._daemon.runtime)]
        left = {one for one in [*self._tree, *marked] if one is not None and _lives(one)}
        return sorted(f"{one.pid} {one.name()}" for one in left)

    def files(self) -> list[str]:
        """What it left outside its own directories, and in the one for temporary files."""
        return sorted(litter() - self._before) + [str(path) for path in self._daemon.tmp.rglob("*")]


def _process(pid: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid)
    return None


def _lives(process: psutil.Process) -> bool:
    """Whether it runs, or a thread of it still ends, with its memory. A zombie is its parent's affair."""
    try:
        if not process.is_running():
            return False
        if process.status() != psutil.STATUS_ZOMBIE:
            return True
        return len(os.listdir(f"/proc/{process.pid}/task")) > 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
