"""What an operator asks of a worker, on real processes: start, stop, drain, restart, and who waits."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from citadel_supervisor.errors import CommandRefused, NotReady
from citadel_supervisor.states import WorkerState as S
from tests.conftest import processes_of
from tests.fake_engine import WEIGHTS
from tests.workers.conftest import StartFleet
from tests.workers.rig import SECONDS, Rig, complete, ended, session_of, zombies


@pytest.fixture
def gate(run_dir: Path) -> int:
    """A FIFO that the fake engine waits at; write bytes to it to let it on."""
    path = run_dir / "gate"
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)


async def loaded(rig: Rig, phase: str, done: int = 0) -> None:
    """Wait until the worker has come that far."""
    worker = rig.alpha
    async with asyncio.timeout(SECONDS):
        await worker._changes.until(
            lambda: (worker.snapshot().progress.phase, worker.snapshot().progress.done) == (phase, done)
        )


async def test_it_comes_up_by_itself_and_says_how_it_was_made(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    seen = await rig.ready()
    assert rig.log.states() == [S.STARTING, S.LOADING, S.VERIFYING, S.READY]
    assert (seen.generation, seen.restarts, seen.launch) == (1, 0, "spawn")
    assert seen.cpus == rig.alpha.generation.spec.cpus  # type: ignore[union-attr]
    assert seen.ready_after_s is not None and 0 < seen.ready_after_s < SECONDS
    assert seen.pid is not None
    assert seen.core_pid is not None
    assert sorted(session_of(seen.pid)) == sorted([seen.pid, seen.core_pid])
    lease = await rig.alpha.lease(0)
    assert await complete(lease.address)
    assert lease.generation == 1
    assert lease.alive()
    lease.release()


async def test_progress_is_what_the_engine_says(start_fleet: StartFleet, run_dir: Path, gate: int) -> None:
    rig = await start_fleet(GATE=run_dir / "gate")
    texts = []
    for phase, done in (("weights", 0), ("weights", WEIGHTS), ("kv_cache", 0)):
        os.write(gate, b".")
        await loaded(rig, phase, done)
        assert rig.alpha.snapshot().state is S.LOADING
        texts.append(rig.alpha.snapshot().progress.text())
    assert [text.split(" (")[0] for text in texts] == ["weights 0 %", "weights 100 %", "kv cache"]
    os.write(gate, b".")
    assert (await rig.ready()).progress.phase == "serving"
    os.close(gate)


async def test_stop_lets_a_request_finish_then_ends_the_processes(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    first = await rig.ready()
    lease = await rig.alpha.lease(0)
    rig.alpha.stop(60)
    await rig.log.move(S.DRAINING)
    assert (await complete(lease.address))[0] == 200
    lease.release()
    seen = await rig.settled()
    assert seen.state is S.STOPPED and seen.pid is None
    assert rig.log.states()[-3:] == [S.DRAINING, S.STOPPING, S.STOPPED]
    assert ("API", 0, True) in [(e.part, e.status, e.expected) for e in rig.log.exits()]
    assert all(e.expected for e in rig.log.exits())
    assert first.pid is not None and session_of(first.pid) == []
    assert rig.forgotten == [lease.address], "its idle connections are dropped"
    assert not os.path.exists(lease.address)


async def test_a_request_that_outlasts_the_drain_is_cut_and_told(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    await rig.ready()
    lease = await rig.alpha.lease(0)
    rig.alpha.stop(0.05)
    async with asyncio.timeout(SECONDS):
        assert "1 requests were still in flight" in await lease.lost
    assert not lease.alive() or rig.alpha.snapshot().state is S.STOPPING
    lease.release()
    assert (await rig.settled()).state is S.STOPPED
    assert not lease.alive()


async def test_what_ignores_sigterm_is_killed_with_all_its_children(
    start_fleet: StartFleet, run_dir: Path
) -> None:
    rig = await start_fleet(
        IGNORE_SIGTERM=1, FORK_CHILDREN=50, STRAY_CHILDREN=50, workers={"stop_grace_s": 0.2}
    )
    seen = await rig.ready()
    assert len(processes_of(run_dir)) == 102
    rig.alpha.stop(0)
    assert (await rig.settled()).state is S.STOPPED
    assert seen.pid is not None and session_of(seen.pid) == []
    assert processes_of(run_dir) == [] and zombies() == []


async def test_children_that_outlive_the_engine_go_with_it(start_fleet: StartFleet, run_dir: Path) -> None:
    rig = await start_fleet(FORK_CHILDREN=2, STRAY_CHILDREN=2)
    await rig.ready()
    assert len(processes_of(run_dir)) == 6
    rig.alpha.stop(0)
    assert (await rig.settled()).state is S.STOPPED
    assert processes_of(run_dir) == [] and zombies() == []


async def test_a_stopped_one_refuses_requests_at_once_and_can_be_started(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    await rig.ready()
    rig.alpha.stop(0)
    await rig.settled()
    with pytest.raises(NotReady) as refused:
        await asyncio.wait_for(rig.alpha.lease(60), 1)
    assert (refused.value.state, refused.value.model) == ("stopped", "alpha")
    assert "stopped by an operator" in str(refused.value)
    rig.alpha.start()
    seen = await rig.ready()
    assert (seen.generation, seen.restarts) == (2, 0), "a start that was asked for is no restart"


async def test_drain_keeps_the_engine_and_start_puts_it_back(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    before = await rig.ready()
    lease = await rig.alpha.lease(0)
    rig.alpha.drain()
    await rig.log.move(S.DRAINING)
    with pytest.raises(NotReady, match="draining: drained by an operator"):
        await asyncio.wait_for(rig.alpha.lease(60), 1)
    assert (await complete(lease.address))[0] == 200, "what runs may finish"
    lease.release()
    assert (await rig.settled()).state is S.DRAINING, "drained is an end in itself"
    rig.alpha.start()
    seen = await rig.ready()
    assert (seen.generation, seen.pid) == (before.generation, before.pid)
    with pytest.raises(CommandRefused, match="only a ready one can be drained"):
        rig.alpha.stop(0)
        await rig.settled()
        rig.alpha.drain()


async def test_a_drained_one_that_crashes_comes_back_drained(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    seen = await rig.ready()
    rig.alpha.drain()
    await rig.settled()
    assert seen.core_pid is not None
    os.kill(seen.core_pid, 9)
    await rig.log.move(S.READY, generation=2)
    assert (await rig.settled()).state is S.DRAINING
    with pytest.raises(NotReady):
        await asyncio.wait_for(rig.alpha.lease(60), 1)
    rig.alpha.start()
    assert (await rig.ready()).generation == 2


async def test_restart_parks_a_request_which_gets_the_new_generation(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    await rig.ready()
    running = await rig.alpha.lease(0)
    rig.alpha.restart(60)
    await rig.log.move(S.DRAINING)
    waiting = asyncio.create_task(rig.alpha.lease(60))
    await asyncio.sleep(0)
    assert rig.alpha.snapshot().waiting_requests == 1
    running.release()
    async with asyncio.timeout(SECONDS):
        lease = await waiting
    assert (running.generation, lease.generation) == (1, 2)
    assert rig.alpha.snapshot().waiting_requests == 0
    assert (await complete(lease.address))[0] == 200
    lease.release()


async def test_a_request_does_not_wait_longer_than_it_may(
    start_fleet: StartFleet, run_dir: Path, gate: int
) -> None:
    rig = await start_fleet(GATE=run_dir / "gate")
    await rig.log.move(S.LOADING)
    with pytest.raises(NotReady) as refused:
        await asyncio.wait_for(rig.alpha.lease(0.05), 2)
    assert refused.value.state == "loading" and refused.value.retry_after_s > 0
    with pytest.raises(NotReady):
        await rig.alpha.lease(0)
    assert rig.alpha.snapshot().waiting_requests == 0
    os.close(gate)


async def test_only_so_many_requests_wait(start_fleet: StartFleet, run_dir: Path, gate: int) -> None:
    rig = await start_fleet(GATE=run_dir / "gate")
    rig.alpha._max_waiting = 2
    await rig.log.move(S.LOADING)
    waiting = [asyncio.create_task(rig.alpha.lease(60)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(NotReady, match="2 requests wait already"):
        await rig.alpha.lease(60)
    os.write(gate, b"....")
    async with asyncio.timeout(SECONDS):
        leases = await asyncio.gather(*waiting)
    assert rig.alpha.snapshot().active_requests == 2
    for lease in leases:
        lease.release()
        lease.release()
    assert rig.alpha.snapshot().active_requests == 0
    os.close(gate)


@pytest.mark.parametrize("again", [False, True])
async def test_stop_while_loading_ends_it_at_once(
    start_fleet: StartFleet, run_dir: Path, gate: int, again: bool
) -> None:
    rig = await start_fleet(GATE=run_dir / "gate")
    await loaded(rig, "config")
    pid = rig.alpha.snapshot().pid
    waiting = asyncio.create_task(rig.alpha.lease(60))
    await asyncio.sleep(0)
    rig.alpha.restart(60) if again else rig.alpha.stop(60)
    await rig.log.move(S.STOPPING)
    assert pid is not None
    await ended(pid)
    if again:
        os.write(gate, b"........")
        async with asyncio.timeout(SECONDS):
            lease = await waiting
        assert lease.generation == 2
        lease.release()
    else:
        with pytest.raises(NotReady):
            await asyncio.wait_for(waiting, SECONDS)
        assert (await rig.settled()).state is S.STOPPED
    assert S.FAILED not in rig.log.states()
    os.close(gate)


async def test_what_is_asked_while_it_stops_is_done_after(start_fleet: StartFleet) -> None:
    rig = await start_fleet(IGNORE_SIGTERM=1, workers={"stop_grace_s": 0.1})
    await rig.ready()
    rig.alpha.stop(0)
    await rig.log.move(S.STOPPING)
    rig.alpha.start()
    assert (await rig.ready_again(2)).restarts == 0
    rig.alpha.restart(0)
    await rig.log.until(lambda: rig.log.states()[-1] is S.STOPPING)
    rig.alpha.stop(0)
    assert (await rig.settled()).state is S.STOPPED
