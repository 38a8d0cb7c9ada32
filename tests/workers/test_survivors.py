"""The supervisor is killed: nothing of it stays, and the next one starts at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from citadel_supervisor.workers.parentage import become_subreaper
from citadel_supervisor.workers.process import end_survivors
from tests.conftest import processes_of
from tests.workers.rig import SECONDS, ended, zombies

Run = Callable[..., Awaitable["Tiny"]]


class Tiny:
    """A running tiny supervisor and what it said."""

    def __init__(self, process: subprocess.Popen[bytes], pids: list[int], survivors: list[int]) -> None:
        self.process = process
        self.pids = pids
        self.survivors = survivors

    async def kill(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
async def tiny(run_dir: Path, fake_engine: Path) -> AsyncIterator[Run]:
    become_subreaper()  # so that what it leaves behind comes to us, and is not lost to init
    made: list[Tiny] = []

    async def run(**flags: object) -> Tiny:
        switches = [f"FAKE_{name}={value}" for name, value in flags.items()]
        command = [
            sys.executable,
            "-m",
            "tests.workers.tiny_supervisor",
            str(run_dir),
            str(fake_engine),
            *switches,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        async with asyncio.timeout(SECONDS):
            line = await asyncio.to_thread(process.stdout.readline)
        assert line, "the tiny supervisor ended before its worker was ready"
        made.append(Tiny(process, **json.loads(line)))
        return made[-1]

    yield run
    for each in made:
        if each.process.returncode is None:
            await each.kill()
    for pid in zombies():
        os.waitpid(pid, 0)


async def test_no_process_outlives_a_killed_supervisor(tiny: Run, run_dir: Path) -> None:
    supervisor = await tiny()
    assert sorted(processes_of(run_dir)) == sorted(supervisor.pids)
    await supervisor.kill()
    async with asyncio.timeout(5):
        for pid in supervisor.pids:
            await ended(pid)
    assert processes_of(run_dir) == []


@pytest.mark.parametrize("part", [0, 1])
async def test_not_even_a_stopped_one(tiny: Run, run_dir: Path, part: int) -> None:
    supervisor = await tiny()
    os.kill(supervisor.pids[part], signal.SIGSTOP)
    await supervisor.kill()
    async with asyncio.timeout(5):
        for pid in supervisor.pids:
            await ended(pid)


async def test_the_next_supervisor_ends_what_did_survive_and_starts(tiny: Run, run_dir: Path) -> None:
    first = await tiny(SURVIVE=1, FORK_CHILDREN=3)
    await first.kill()
    left = processes_of(run_dir)
    assert len(left) == 5 and set(left) > set(first.pids), "the test is only one if some do survive"
    second = await tiny()
    assert sorted(second.survivors) == sorted(left)
    assert sorted(processes_of(run_dir)) == sorted(second.pids)


async def test_survivors_are_known_by_their_own_supervisors_directory_only(
    tiny: Run, run_dir: Path, tmp_path: Path
) -> None:
    supervisor = await tiny(SURVIVE=1)
    assert await end_survivors(tmp_path) == []
    assert await end_survivors(run_dir.with_name(run_dir.name + "-longer")) == []
    assert await end_survivors(run_dir.parent) == []
    assert sorted(processes_of(run_dir)) == sorted(supervisor.pids)
