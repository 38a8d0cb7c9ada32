"""Engines that die or never come up, on real processes: what is ended, what is tried again, what is not."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.errors import NotReady
from citadel_supervisor.events import Event, Transition
from citadel_supervisor.states import WorkerSnapshot
from citadel_supervisor.states import WorkerState as S
from citadel_supervisor.workers.generation import Generation
from citadel_supervisor.workers.verify import check_known_answer
from tests.workers.conftest import StartFleet
from tests.workers.rig import SECONDS, Rig, complete, session_of, zombies


def pid_of(seen: WorkerSnapshot, part: str) -> int:
    pid = seen.core_pid if part == "engine core" else seen.pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("part", ["engine core", "API"])
async def test_a_killed_process_takes_its_tree_along_and_a_new_one_comes(
    start_fleet: StartFleet, part: str
) -> None:
    rig = await start_fleet(FORK_CHILDREN=3)
    first = await rig.ready()
    lease = await rig.alpha.lease(0)
    left_when_next_began: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, Transition) and event.generation == 2 and event.after is S.STARTING:
            left_when_next_began.extend(session_of(pid_of(first, "API")))

    rig.bus.subscribe(look)
    os.kill(pid_of(first, part), signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        reason = await lease.lost
    again = await rig.ready_again(2)
    assert left_when_next_began == [], "zombies included"
    assert (again.restarts, again.generation) == (1, 2)
    assert part in reason or "exit code 70" in reason
    assert rig.log.states(generation=1)[-2:] == [S.FAILED, S.BACKING_OFF]
    assert rig.forgotten == [lease.address]
    lease.release()
    assert {(e.part, e.expected) for e in rig.log.exits()} >= {(part, False)}


async def test_alive_is_asked_of_the_kernel_before_anything_is_known(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    seen = await rig.ready()
    lease = await rig.alpha.lease(0)
    watch = os.pidfd_open(pid_of(seen, "engine core"))
    os.kill(pid_of(seen, "engine core"), signal.SIGKILL)
    select.select([watch], [], [], SECONDS)  # blocks the event loop: it cannot have noticed
    os.close(watch)
    assert rig.alpha.snapshot().state is S.READY and not lease.lost.done()
    assert not lease.alive()
    lease.release()
    await rig.ready_again(2)


async def test_a_request_that_comes_after_the_loss_waits_for_the_next(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    seen = await rig.ready()
    os.kill(pid_of(seen, "engine core"), signal.SIGKILL)
    await rig.log.move(S.FAILED)
    async with asyncio.timeout(SECONDS):
        lease = await rig.alpha.lease(60)
    assert lease.generation == 2 and (await complete(lease.address))[0] == 200
    lease.release()


async def test_a_crash_in_the_middle_of_a_request_is_told_and_mended(start_fleet: StartFleet) -> None:
    rig = await start_fleet(CRASH_TOKEN="3@1")
    await rig.ready()
    lease = await rig.alpha.lease(0)
    with pytest.raises(Exception):  # noqa: B017 - the connection breaks in whatever way
        await complete(lease.address, stream=True)
    async with asyncio.timeout(SECONDS):
        assert await lease.lost
    lease.release()
    lease = await rig.alpha.lease(60)
    assert (await complete(lease.address, stream=True))[0] == 200
    lease.release()


async def test_the_first_restart_is_immediate_then_the_waits_grow(start_fleet: StartFleet) -> None:
    rig = await start_fleet(
        EXIT_AT_START=70, workers={"backoff": {"initial_s": 0.1, "factor": 2, "jitter": 0, "restarts": 3}}
    )
    seen = await rig.settled()
    assert seen.state is S.QUARANTINED and seen.generation == 4
    waits = [m for m in rig.log.moves() if m.after is S.BACKING_OFF]
    starts = [m for m in rig.log.moves() if m.after is S.STARTING][1:]
    paused = [start.at - wait.at for wait, start in zip(waits, starts, strict=True)]
    assert paused[0] < 0.05 and "next start" not in waits[0].reason
    assert paused[1] >= 0.099 and paused[2] >= 0.199
    assert [wait.reason[:21] for wait in waits[1:]] == ["next start in 0.1 s; ", "next start in 0.2 s; "]


async def test_a_used_up_budget_is_quarantine_until_an_operator_acts(start_fleet: StartFleet) -> None:
    rig = await start_fleet(
        EXIT_AT_START=3, workers={"backoff": {"initial_s": 0.01, "jitter": 0, "restarts": 2}}
    )
    seen = await rig.settled()
    assert seen.state is S.QUARANTINED and seen.pid is None
    assert "lost 3 generations within 600 s" in seen.reason and "exit code 3" in seen.reason
    assert [e.status for e in rig.log.exits()] == [3, 3, 3]
    with pytest.raises(NotReady, match=r"quarantined.*exit code 3"):
        await asyncio.wait_for(rig.alpha.lease(60), 1)
    rig.alpha.start()
    await rig.log.move(S.STARTING, generation=4)
    again = await rig.settled()
    assert (again.state, again.generation) == (S.QUARANTINED, 6), "an operator's start begins a new budget"
    rig.alpha.stop()
    assert (await rig.settled()).state is S.STOPPED


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"EXIT_AT_START": 78}, "no restart will help"),
        ({"FATAL": "the checkpoint has no weights"}, "the checkpoint has no weights"),
    ],
)
async def test_what_can_never_start_is_quarantined_at_once(
    start_fleet: StartFleet, flags: dict[str, object], said: str
) -> None:
    rig = await start_fleet(**flags)  # type: ignore[arg-type]
    seen = await rig.settled()
    assert (seen.state, seen.generation, seen.restarts) == (S.QUARANTINED, 1, 0)
    assert said in seen.reason
    assert [e.status for e in rig.log.exits()] == [78]


async def test_the_reason_an_engine_gives_is_the_one_shown(start_fleet: StartFleet) -> None:
    rig = await start_fleet(TROUBLE="no memory for the KV cache@1")
    assert (await rig.ready_again(2)).restarts == 1
    failed = await rig.log.move(S.BACKING_OFF, generation=1)
    assert failed.reason == "no memory for the KV cache"


@pytest.mark.parametrize("phase", ["weights", "kv_cache", "warm_up"])
async def test_a_core_that_dies_while_loading_is_noticed(start_fleet: StartFleet, phase: str) -> None:
    rig = await start_fleet(CRASH_IN=f"{phase}@1")
    await rig.ready_again(2)
    assert rig.log.states(generation=1) == [S.STARTING, S.LOADING, S.FAILED, S.BACKING_OFF]


async def test_lines_that_are_no_reports_are_passed_over(start_fleet: StartFleet) -> None:
    rig = await start_fleet(GARBAGE_REPORTS=1)
    assert (await rig.ready()).generation == 1


async def test_an_interpreter_that_is_not_there_says_so(start_fleet: StartFleet, run_dir: Path) -> None:
    rig = await start_fleet(
        {"alpha": {"python": str(run_dir / "nowhere" / "python")}}, workers={"backoff": {"restarts": 0}}
    )
    seen = await rig.settled()
    assert seen.state is S.QUARANTINED
    assert f"cannot start {run_dir}/nowhere/python: No such file or directory" in seen.reason


async def test_one_worker_in_trouble_leaves_the_others_alone(start_fleet: StartFleet) -> None:
    rig = await start_fleet({"alpha": {}, "beta": {}, "gamma": {"env": {"FAKE_FATAL": "never"}}})
    alpha, beta = await rig.ready(), await rig.ready("beta")
    assert (await rig.settled("gamma")).state is S.QUARANTINED
    lease = await rig.fleet.workers["beta"].lease(0)
    for generation in (2, 3):
        os.kill(pid_of(rig.alpha.snapshot(), "engine core"), signal.SIGKILL)
        await rig.ready_again(generation)
    after = await rig.ready("beta")
    assert (after.generation, after.pid, after.core_pid) == (1, beta.pid, beta.core_pid)
    assert lease.alive() and not lease.lost.done()
    assert (await complete(lease.address))[0] == 200
    assert alpha.pid != rig.alpha.snapshot().pid
    lease.release()


def break_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = Generation.start

    async def start(self: Generation, *arguments: Any) -> None:
        if self.spec.generation == 1:
            raise error
        await real(self, *arguments)

    monkeypatch.setattr(Generation, "start", start)


def break_end(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The first try to end the first generation fails; something has to end it, so it is crashed too."""
    real, tries = Generation.end, []

    async def end(self: Generation, grace_s: float) -> bool:
        tries.append(grace_s)
        if len(tries) == 1:
            raise error
        return await real(self, grace_s)

    monkeypatch.setattr(Generation, "end", end)
    monkeypatch.setattr("citadel_supervisor.workers.steps.END_AGAIN_S", 0.01)
    break_verify(monkeypatch, error)


def break_verify(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    calls = []

    async def check(*arguments: Any) -> str:
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return await check_known_answer(*arguments)

    monkeypatch.setattr("citadel_supervisor.workers.fleet.check_known_answer", check)


@pytest.mark.parametrize("broken", [break_start, break_verify, break_end])
async def test_a_bug_in_a_step_costs_the_generation_not_the_fleet(
    start_fleet: StartFleet,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch, Exception], None],
) -> None:
    broken(monkeypatch, RuntimeError("nobody foresaw this"))
    rig = await start_fleet({"alpha": {}, "beta": {"enabled": False}})
    assert (await rig.ready_again(2)).restarts == 1
    failed = await rig.log.move(S.FAILED)
    assert "RuntimeError: nobody foresaw this" in failed.reason


async def test_a_runtime_directory_that_cannot_be_used_is_a_reason_not_an_end(
    start_fleet: StartFleet, run_dir: Path
) -> None:
    (run_dir / "workers").write_text("a file is in the way")
    rig = await start_fleet(workers={"backoff": {"restarts": 1, "initial_s": 0.01}})
    seen = await rig.settled()
    assert seen.state is S.QUARANTINED and "workers" in seen.reason
    (run_dir / "workers").unlink()
    rig.alpha.start()
    await rig.ready()


def resources() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


async def test_twenty_crashes_leave_nothing_behind(start_fleet: StartFleet, run_dir: Path) -> None:
    temporary, shared = set(os.listdir("/tmp")), set(os.listdir("/dev/shm"))
    rig = await start_fleet(
        LITTER=1,
        FORK_CHILDREN=1,
        workers={"backoff": {"initial_s": 0.001, "maximum_s": 0.001, "restarts": 99}},
    )
    await crash(rig, 3)
    before = resources()
    await crash(rig, 20)
    assert rig.alpha.snapshot().generation == 24
    assert resources() == before
    names = {"alpha.24", "alpha.24.sock"}
    assert set(os.listdir(run_dir / "workers")) == names
    assert {name for name in set(os.listdir("/tmp")) - temporary if "litter" in name} == set()
    assert set(os.listdir("/dev/shm")) <= shared
    assert zombies() == []


async def crash(rig: Rig, times: int) -> None:
    await rig.settled()
    first = rig.alpha.snapshot().generation
    for generation in range(first, first + times):
        os.kill(pid_of(rig.alpha.snapshot(), "engine core"), signal.SIGKILL)
        await rig.ready_again(generation + 1)
    await rig.settled()
