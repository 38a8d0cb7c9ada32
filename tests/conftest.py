"""Fixtures that tests of several parts share."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from citadel_supervisor.workers.process import carries_mark, process_table


@pytest.fixture(scope="session")
def fake_engine() -> Iterator[Path]:
    """An executable to name as a model's `python`: runs tests/fake_engine.py, which says what it can do."""
    place = Path(tempfile.mkdtemp(prefix="citadel-fake-"))
    wrapper = place / "fake-engine"
    script = Path(__file__).with_name("fake_engine.py")
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    wrapper.chmod(0o755)
    yield wrapper
    shutil.rmtree(place)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A runtime directory with a short path, as unix sockets need; whatever runs for it is killed after."""
    place = Path(tempfile.mkdtemp(prefix="citadel-"))
    yield place
    kill_everything_of(place)
    shutil.rmtree(place)


def kill_everything_of(runtime: Path) -> list[int]:
    """End every process that a supervisor with this runtime directory made; returns their pids."""
    found: list[int] = []
    for pid in processes_of(runtime):
        found.append(pid)
        with contextlib.suppress(ProcessLookupError):
            watch = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            wait_for_end(watch)
            os.close(watch)
    for pid in found:  # now that their parents have ended too, all are ours
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return found


def processes_of(runtime: Path) -> list[int]:
    """The living processes that a supervisor with this runtime directory made."""
    table = process_table()
    return [e.pid for e in table.values() if e.state != "Z" and carries_mark(e.pid, runtime)]


def wait_for_end(pidfd: int, seconds: float = 10.0) -> None:
    """Block until the process has ended."""
    readable, _, _ = select.select([pidfd], [], [], seconds)
    assert readable, f"a process does not end within {seconds:g} s"
