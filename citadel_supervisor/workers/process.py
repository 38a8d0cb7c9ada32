"""One generation's processes: watching them through pidfds, ending the whole tree, orphans.

Processes are found by what the kernel says of them: a worker's API process leads a session, and
every process the supervisor makes carries `CITADEL_RUNTIME` in the environment it was started with,
which forks inherit. No process is waited for that is not named: never waitpid(-1).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

MARK = "CITADEL_RUNTIME"
"""Environment variable of every process made by a supervisor: its runtime directory."""

UNCLAIMED_S = 2.0
"""A child of ours that ended so long ago is nobody's: whoever had made it would have reaped it."""

UNKNOWN_STATUS = -256
"""The exit status of a process whose parent is another."""


class ProcessWatch:
    """Watches one process; `on_exit(status)` is called once when it has ended.

    Status: the exit code, or minus the signal's number; UNKNOWN_STATUS if it was never our child.
    """

    def __init__(self, pid: int, on_exit: Callable[[int], None]) -> None:
        """Raises ProcessLookupError when there is no such process."""
        self.pid = pid
        self._on_exit = on_exit
        self._fd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._exited)

    def alive(self) -> bool:
        """Whether the process has not ended, asked of the kernel now."""
        if self._fd < 0:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process, never to a successor of its pid."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _exited(self) -> None:
        status = reap(self.pid)
        if status == UNKNOWN_STATUS:
            status = _status_of_zombie(self.pid)
        self.close()
        self._on_exit(status)


def reap(pid: int) -> int:
    """The exit status of an ended child; UNKNOWN_STATUS when it is not ours or has not ended."""
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return UNKNOWN_STATUS
    return os.waitstatus_to_exitcode(status) if ended else UNKNOWN_STATUS


def _status_of_zombie(pid: int) -> int:
    """How another's child ended, while its parent has not waited for it; else UNKNOWN_STATUS."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return UNKNOWN_STATUS
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == b"Z" else UNKNOWN_STATUS


def signal_name(status: int) -> str:
    """Human form of an exit status: "exit code 70", "killed by SIGKILL"."""
    if status == UNKNOWN_STATUS:
        return "ended"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit code {status}"


class ProcessEntry:
    """One line of the process table, as /proc/PID/stat has it."""

    __slots__ = ("began", "cpu_ticks", "pid", "ppid", "session", "state")

    def __init__(self, pid: int, state: str, ppid: int, session: int, cpu_ticks: int, began: int = 0) -> None:
        self.pid = pid
        self.state = state
        self.ppid = ppid
        self.session = session
        self.cpu_ticks = cpu_ticks
        self.began = began
        """When it started, in ticks since the host did: tells it from a successor of its pid."""


def read_process(pid: int) -> ProcessEntry | None:
    """The process's line, or None when it is gone. `cpu_ticks` is user and system time."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    ticks = int(fields[11]) + int(fields[12])
    return ProcessEntry(pid, fields[0], int(fields[1]), int(fields[3]), ticks, int(fields[19]))


def process_table() -> dict[int, ProcessEntry]:
    """Every process of the host by pid; takes a few milliseconds for some hundred processes."""
    entries = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {entry.pid: entry for entry in entries if entry is not None}


def own_children() -> list[ProcessEntry]:
    """The children of this process, zombies included."""
    pids: list[int] = []
    lists = list(Path("/proc/self/task").glob("*/children"))
    if not lists:  # a kernel without CONFIG_PROC_CHILDREN
        return [entry for entry in process_table().values() if entry.ppid == os.getpid()]
    for path in lists:
        with contextlib.suppress(OSError):  # the thread has ended: its children are another's now
            pids += map(int, path.read_text(encoding="ascii").split())
    entries = (read_process(pid) for pid in pids)
    return [entry for entry in entries if entry is not None]


def tree_of(leader: int, table: dict[int, ProcessEntry], besides: Iterable[int] = ()) -> list[ProcessEntry]:
    """The processes of the leader's session and all descendants of the leader and of `besides`."""
    members = {leader, *besides}
    grew = True
    while grew:
        more = {entry.pid for entry in table.values() if entry.ppid in members or entry.session == leader}
        grew = not more <= members
        members |= more
    return [table[pid] for pid in members if pid in table]


def carries_mark(pid: int, runtime: Path) -> bool:
    """Whether the process was made by the supervisor of that runtime directory."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={runtime}".encode() in environment.split(b"\0")


async def end_tree(leader: int, patience_s: float = 10.0) -> bool:
    """SIGKILL the leader's whole tree and reap what is ours of it; True once nothing is left.

    A process may fork between the look and the signal, so it looks again until the tree is empty. A
    zombie counts until it is reaped: its other threads may still be ending, with memory and cores. What
    once was seen in the tree stays in it, with all below it, though its parent has died meanwhile.
    """
    deadline = asyncio.get_running_loop().time() + patience_s
    pause = 0.002
    members: dict[int, int] = {}
    while True:
        table = process_table()
        roots = {pid for pid, began in members.items() if pid in table and table[pid].began == began}
        found = tree_of(leader, table, roots)
        members = {entry.pid: entry.began for entry in found}
        if not found:
            return True
        # Reaped now still counts: it may have forked after the look that found it.
        left = [entry for entry in found if not _gone(entry)]
        if any(entry.session == leader for entry in left):
            _kill_group(leader)
        _kill(entry.pid for entry in left if entry.state != "Z")
        if asyncio.get_running_loop().time() > deadline:
            return all(entry.state == "Z" for entry in left)
        await asyncio.sleep(pause if left else 0)
        pause = min(pause * 2, 0.1)


def _gone(entry: ProcessEntry) -> bool:
    """Whether this zombie child of ours could be reaped now."""
    return entry.state == "Z" and entry.ppid == os.getpid() and reap(entry.pid) != UNKNOWN_STATUS


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _kill_group(leader: int) -> None:
    """SIGKILL the session's first group, with most or all of the tree in it, faster than any fork."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


class Orphans:
    """The children of this process that nobody meant it to have.

    What a dead worker or zygote leaves behind is handed by the kernel to the supervisor, a child
    subreaper. `known` are the children that have an owner; `starting` counts launches whose process
    has not said hello yet, during which nothing is swept.
    """

    def __init__(self, runtime: Path) -> None:
        self._runtime = runtime
        self._doomed: set[int] = set()
        self._zombies: dict[int, float] = {}
        self.known: set[int] = set()
        self.sessions: set[int] = set()
        self.starting = 0

    async def end_all(self, patience_s: float = 2.0) -> None:
        """Sweep until none is left; not while a launch is under way."""
        deadline = time.monotonic() + patience_s
        while (self.sweep() or self._doomed) and not self.starting and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def sweep(self) -> list[int]:
        """Kill and reap them; returns the pids newly found. Takes less than a millisecond."""
        if self.starting:
            return []
        mine = {entry.pid: entry for entry in own_children()}
        for pid in self._doomed - mine.keys():  # the kernel's list may leave out one while another ends
            entry = read_process(pid)
            if entry is not None and entry.ppid == os.getpid():
                mine[pid] = entry
        strangers = [entry for entry in mine.values() if entry.pid not in self.known]
        zombies = {entry.pid for entry in strangers if entry.state == "Z"}
        self._zombies = {pid: self._zombies.get(pid, time.monotonic()) for pid in zombies}
        self._doomed &= mine.keys()
        strangers = [entry for entry in strangers if self._ours(entry)]
        found = [entry.pid for entry in strangers if entry.pid not in self._doomed]
        for entry in strangers:
            if entry.state == "Z":
                reap(entry.pid)
                self._doomed.discard(entry.pid)
            else:
                _kill([entry.pid])
                self._doomed.add(entry.pid)
        return found

    def _ours(self, entry: ProcessEntry) -> bool:
        # A zombie has no environment left to read; it is known by its session or from before. One that
        # nobody has asked for in a while has no other owner either.
        if entry.pid in self._doomed or entry.session in self.sessions:
            return True
        if entry.state == "Z":
            return time.monotonic() - self._zombies[entry.pid] > UNCLAIMED_S
        return carries_mark(entry.pid, self._runtime)


async def end_survivors(runtime: Path, patience_s: float = 5.0) -> list[int]:
    """Kill what an earlier supervisor of the same runtime directory left; returns the pids.

    Call before anything is started, with the runtime directory's lock held.
    """
    deadline = asyncio.get_running_loop().time() + patience_s
    ended: list[int] = []
    while True:
        survivors = [
            entry.pid
            for entry in process_table().values()
            if entry.state != "Z" and entry.pid != os.getpid() and carries_mark(entry.pid, runtime)
        ]
        if not survivors or asyncio.get_running_loop().time() > deadline:
            return ended
        ended += [pid for pid in survivors if pid not in ended]
        _kill(survivors)
        await asyncio.sleep(0.01)
