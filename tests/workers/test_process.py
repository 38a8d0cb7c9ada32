"""Processes by themselves: watching, reading and ending them, and telling ours from others'."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from citadel_supervisor.workers.parentage import become_subreaper
from citadel_supervisor.workers.process import (
    MARK,
    UNKNOWN_STATUS,
    Orphans,
    ProcessWatch,
    carries_mark,
    end_tree,
    own_children,
    process_table,
    read_process,
    reap,
    signal_name,
    tree_of,
)
from tests.conftest import wait_for_end
from tests.workers.rig import SECONDS, session_of

Spawn = Callable[..., int]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """`spawn(code, mark=None)`: a session of its own that runs Python code and has said it is ready."""
    become_subreaper()
    made: list[int] = []

    def start(code: str, mark: Path | None = None) -> int:
        ready, say = os.pipe()
        prelude = "import os, signal, sys, time\nready = lambda: os.write(9, b'.')\n"
        env = {"PATH": "/bin:/usr/bin"} | ({MARK: str(mark)} if mark else {})
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-I", "-c", prelude + code], env,
            file_actions=[(os.POSIX_SPAWN_DUP2, say, 9)], setsid=True,
        )  # fmt: skip
        made.append(pid)
        os.close(say)
        assert os.read(ready, 1) == b".", "it says when it is ready"
        os.close(ready)
        return pid

    yield start
    for pid in {*made, *(entry.pid for entry in own_children())}:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


PAUSE = "ready()\nsignal.pause()"


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("ready()\nos._exit(70)", 70, "exit code 70"),
        ("ready()\nos._exit(0)", 0, "exit code 0"),
        ("ready()\nos.kill(os.getpid(), 11)", -11, "killed by SIGSEGV"),
    ],
)
async def test_a_watch_tells_the_exact_status_once(spawn: Spawn, code: str, status: int, text: str) -> None:
    seen: list[int] = []
    told = asyncio.Event()

    def on_exit(status: int) -> None:
        seen.append(status)
        told.set()

    watch = ProcessWatch(spawn(code), on_exit)
    async with asyncio.timeout(SECONDS):
        await told.wait()
    assert seen == [status] and signal_name(status) == text
    assert read_process(watch.pid) is None, "it is reaped"
    assert not watch.alive()
    watch.signal(signal.SIGTERM)
    watch.close()


def test_names_of_statuses() -> None:
    assert signal_name(UNKNOWN_STATUS) == "ended"
    assert signal_name(-64) == "exit code -64" or "SIGRTMAX" in signal_name(-64)


async def test_a_watch_asks_the_kernel_and_signals_only_its_own_process(spawn: Spawn) -> None:
    pid = spawn(PAUSE)
    told = asyncio.Event()
    watch = ProcessWatch(pid, lambda _status: told.set())
    assert watch.alive()
    watch.signal(signal.SIGSTOP)
    assert watch.alive(), "a stopped process lives"
    watch.signal(signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        await told.wait()
    with pytest.raises(ProcessLookupError):
        ProcessWatch(pid, lambda _status: None)


@pytest.mark.parametrize(
    ("parent", "status"),
    [("pass", 3), ("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", UNKNOWN_STATUS)],
    ids=["waits later", "does not want to know"],
)
async def test_how_the_child_of_another_ended_is_read_while_it_can_be(
    spawn: Spawn, parent: str, status: int
) -> None:
    child = "ready()\n    signal.sigwait([signal.SIGUSR1])\n    os._exit(3)"
    code = f"if not os.fork():\n    {child}\nsignal.pause()"
    leader = spawn(f"{parent}\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n{code}")
    (grandchild,) = [entry for entry in process_table().values() if entry.ppid == leader]
    seen: list[int] = []
    told = asyncio.Event()

    def on_exit(status: int) -> None:
        seen.append(status)
        told.set()

    watch = ProcessWatch(grandchild.pid, on_exit)
    watch.signal(signal.SIGUSR1)
    async with asyncio.timeout(SECONDS):
        await told.wait()
    assert seen == [status]


def test_reaping_what_has_not_ended_or_is_not_ours(spawn: Spawn) -> None:
    assert reap(spawn(PAUSE)) == UNKNOWN_STATUS
    assert reap(1) == UNKNOWN_STATUS


def test_the_process_table_reads_what_the_kernel_says(spawn: Spawn) -> None:
    pid = spawn("open('/proc/self/comm', 'w').write('a) S 1 (b')\n" + PAUSE)
    entry = read_process(pid)
    assert entry is not None
    assert (entry.pid, entry.ppid, entry.session) == (pid, os.getpid(), pid) and entry.state in "RS"
    assert pid in process_table() and pid in [child.pid for child in own_children()]
    assert read_process(2**22 - 1) is None
    busy = read_process(os.getpid())
    assert busy is not None and busy.cpu_ticks > entry.cpu_ticks >= 0


FAMILY = """
for kind in range(4):
    if os.fork():
        continue
    if kind == 1:
        os.setsid()
    if kind == 2:
        os.setsid()
        if os.fork():
            signal.pause()
    if kind == 3:
        if os.fork():
            os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    signal.pause()
os.wait()
signal.pause()
"""
"""A child, one with a session of its own, one of those with a child, and an orphan of the same session."""


async def family(spawn: Spawn) -> int:
    leader = spawn(FAMILY)
    async with asyncio.timeout(SECONDS):
        while len(tree_of(leader, process_table())) < 6:
            await asyncio.sleep(0)
    return leader


async def test_a_tree_is_the_session_and_all_descendants(spawn: Spawn) -> None:
    leader = await family(spawn)
    other = spawn(PAUSE)
    members = {entry.pid for entry in tree_of(leader, process_table())}
    assert leader in members and other not in members and os.getpid() not in members


async def test_ending_a_tree_leaves_nothing_of_it_and_all_else_alone(spawn: Spawn) -> None:
    leader = await family(spawn)
    other = spawn(PAUSE)
    members = [entry.pid for entry in tree_of(leader, process_table())]
    assert await end_tree(leader)
    assert [pid for pid in members if read_process(pid) is not None] == [], "zombies included"
    assert read_process(other) is not None


async def test_a_tree_that_forks_without_end_is_ended(spawn: Spawn) -> None:
    leader = spawn(
        "ready()\n"
        "end = time.monotonic() + 20\n"
        "while time.monotonic() < end:\n"
        "    if os.fork():\n"
        "        time.sleep(0.005)\n"
        "        os._exit(0)\n"
    )
    assert await end_tree(leader)
    assert session_of(leader) == []


async def test_ending_what_is_gone_is_nothing(spawn: Spawn) -> None:
    pid = spawn("ready()")
    watch = os.pidfd_open(pid)
    wait_for_end(watch)
    os.close(watch)
    assert await end_tree(pid)
    assert read_process(pid) is None
    assert await end_tree(pid)


def test_the_mark_is_the_whole_path(spawn: Spawn, tmp_path: Path) -> None:
    pid = spawn(PAUSE, mark=tmp_path / "run")
    assert carries_mark(pid, tmp_path / "run")
    assert not carries_mark(pid, tmp_path / "run2")
    assert not carries_mark(pid, tmp_path)
    assert not carries_mark(spawn(PAUSE), tmp_path / "run")
    assert not carries_mark(2**22 - 1, tmp_path / "run")


def adopt(spawn: Spawn, mark: Path | None, then: str = PAUSE) -> int:
    """A process in a session of its own, whose parent has ended: it is ours now."""
    before = {child.pid for child in own_children()}
    parent = spawn(f"if os.fork():\n    signal.pause()\nos.setsid()\n{then}", mark)
    (pid,) = [entry.pid for entry in process_table().values() if entry.ppid == parent]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert {child.pid for child in own_children()} - before == {pid}
    return pid


async def test_orphans_of_ours_are_ended_and_others_left(spawn: Spawn, tmp_path: Path) -> None:
    orphans = Orphans(tmp_path)
    known, other, stranger = spawn(PAUSE, tmp_path), spawn(PAUSE), adopt(spawn, tmp_path)
    orphans.known.add(known)
    orphans.starting = 1
    assert orphans.sweep() == [], "a launch is under way: it may be the new worker"
    orphans.starting = 0
    assert orphans.sweep() == [stranger]
    await orphans.end_all()
    assert read_process(stranger) is None, "it is reaped as well"
    assert read_process(known) is not None and read_process(other) is not None


async def test_one_that_the_kernels_list_leaves_out_is_not_forgotten(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphans = Orphans(tmp_path)
    stranger = adopt(spawn, tmp_path)
    assert orphans.sweep() == [stranger]
    watch = os.pidfd_open(stranger)
    wait_for_end(watch)
    os.close(watch)
    with monkeypatch.context() as patched:  # proc(5): children may be omitted while others exit
        patched.setattr("citadel_supervisor.workers.process.own_children", list)
        orphans.sweep()
    orphans.sweep()
    assert read_process(stranger) is None


async def test_an_orphan_that_ended_by_itself_is_reaped(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphans = Orphans(tmp_path)
    claimed, unclaimed = spawn("ready()"), adopt(spawn, tmp_path, "ready()\nsignal.pause()")
    os.kill(unclaimed, signal.SIGKILL)
    orphans.known.add(claimed)
    for pid in (claimed, unclaimed):
        watch = os.pidfd_open(pid)
        wait_for_end(watch)
        os.close(watch)
    orphans.sweep()
    left = read_process(unclaimed)
    assert left is not None and left.state == "Z", "who made it may still ask for its status"
    monkeypatch.setattr("citadel_supervisor.workers.process.UNCLAIMED_S", 0)
    orphans.sweep()
    assert read_process(unclaimed) is None
    assert read_process(claimed) is not None


async def test_zombies_of_a_known_session_are_reaped_at_once(spawn: Spawn, tmp_path: Path) -> None:
    orphans = Orphans(tmp_path)
    pid = spawn("ready()")
    watch = os.pidfd_open(pid)
    wait_for_end(watch)
    os.close(watch)
    orphans.sessions.add(pid)
    orphans.sweep()
    assert read_process(pid) is None
