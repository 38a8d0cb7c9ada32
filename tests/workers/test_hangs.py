"""Engines that live but do not work, on real processes: found and replaced; busy ones are left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.errors import UpstreamError
from citadel_supervisor.states import WorkerState as S
from tests.workers.conftest import StartFleet
from tests.workers.rig import SECONDS, Rig, complete

QUICK: dict[str, Any] = {
    "health": {
        "check_interval_s": 0.05,
        "stall_s": 0.5,
        "probe_interval_s": 0.1,
        "probe_timeout_s": 0.2,
        "failures": 3,
        "load_stall_s": 0.5,
    }
}
BOUND_S = 3.0
"""Far more than the settings above allow, for a host that is busy with other things."""


async def ask_something(rig: Rig) -> asyncio.Task[tuple[int, bytes]]:
    """A request that the engine has begun to answer."""
    lease = await rig.alpha.lease(0)
    task = asyncio.create_task(complete(lease.address, max_tokens=50))
    await rig.state(running=1)
    task.add_done_callback(lambda _: lease.release())
    return task


async def replaced(rig: Rig, since: float) -> str:
    """Why the first generation was given up, which must be soon."""
    failed = await rig.log.move(S.FAILED)
    assert failed.generation == 1
    assert failed.at - since < BOUND_S
    await rig.ready_again(2)
    return failed.reason


@pytest.mark.parametrize(("part", "name"), [("core_pid", "engine core"), ("pid", "API process")])
@pytest.mark.parametrize("working", [True, False])
async def test_a_stopped_process_is_found_and_the_tree_replaced(
    start_fleet: StartFleet, part: str, name: str, working: bool, run_dir: Path
) -> None:
    os.mkfifo(run_dir / "tokens")
    rig = await start_fleet(TOKENS=run_dir / "tokens", workers=QUICK)
    seen = await rig.ready()
    task = await ask_something(rig) if working else None
    began = time.time()
    os.kill(getattr(seen, part), signal.SIGSTOP)
    assert f"hung: the {name} has been stopped by a signal for 0.5 s" in await replaced(rig, began)
    if task is not None:
        with pytest.raises(UpstreamError):
            await task


async def test_an_engine_without_tokens_or_cpu_is_hung(start_fleet: StartFleet) -> None:
    rig = await start_fleet(HANG="2@1", workers=QUICK)
    await rig.ready()
    began = time.time()
    task = await ask_something(rig)
    assert "no token and no CPU time for 0.5 s with 1 requests waiting" in await replaced(rig, began)
    with pytest.raises(UpstreamError):
        await task


async def test_an_engine_that_computes_is_busy_not_hung(start_fleet: StartFleet, run_dir: Path) -> None:
    rig = await start_fleet(BUSY=2, workers=QUICK)
    await rig.ready()
    task = await ask_something(rig)
    # It is asked at each look while it works: so many looks take longer than a stall may.
    assert (await rig.state(metrics=30))["tokens"] == 2
    assert rig.log.states() == [S.STARTING, S.LOADING, S.VERIFYING, S.READY]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_engine_that_computes_for_ever_is_wedged(start_fleet: StartFleet) -> None:
    rig = await start_fleet(BUSY="2@1", workers={"health": QUICK["health"] | {"spin_s": 1.0}})
    await rig.ready()
    began = time.time()
    task = await ask_something(rig)
    assert "no token for 1 s with 1 requests waiting, though it uses CPU" in await replaced(rig, began)
    with pytest.raises(UpstreamError):
        await task


async def test_slow_tokens_are_progress(start_fleet: StartFleet, run_dir: Path) -> None:
    os.mkfifo(run_dir / "tokens")
    gate = os.open(run_dir / "tokens", os.O_RDWR)
    rig = await start_fleet(TOKENS=run_dir / "tokens", workers={"health": QUICK["health"] | {"stall_s": 1}})
    await rig.ready()
    task = await ask_something(rig)
    for looks in range(4, 28, 4):  # a token every fourth look, for longer than a stall may last
        await rig.state(metrics=looks)
        os.write(gate, b".")
    assert rig.log.states()[-1] is S.READY
    task.cancel()
    os.close(gate)


async def test_an_idle_engine_is_not_hung(start_fleet: StartFleet) -> None:
    rig = await start_fleet(workers=QUICK)
    await rig.ready()
    await rig.state(health=12)  # it is probed so often in more than twice the time of a stall
    assert rig.log.states()[-1] is S.READY


async def test_three_failed_probes_replace_an_engine(start_fleet: StartFleet) -> None:
    rig = await start_fleet(DEAF="/health@1", workers=QUICK)
    await rig.ready()
    assert await replaced(rig, time.time()) == "hung: 3 health probes in a row failed"


async def test_loading_that_stands_still_is_given_up(start_fleet: StartFleet, run_dir: Path) -> None:
    os.mkfifo(run_dir / "gate")
    rig = await start_fleet(GATE=f"{run_dir}/gate@1", workers=QUICK)
    await rig.log.move(S.LOADING)
    assert "loading made no progress and used no CPU for 0.5 s" in await replaced(rig, time.time())


async def test_an_engine_that_never_says_hello_is_given_up(start_fleet: StartFleet) -> None:
    rig = await start_fleet(NO_HELLO="1@1", workers=QUICK)
    assert "loading made no progress" in await replaced(rig, time.time())


async def test_an_engine_that_does_not_answer_the_check_is_given_up(start_fleet: StartFleet) -> None:
    rig = await start_fleet(DEAF="/v1/completions@1", workers=QUICK)
    await rig.log.move(S.VERIFYING)
    assert "no token and no CPU time" in await replaced(rig, time.time())


async def test_metrics_without_numbers_do_not_blind_the_watch(start_fleet: StartFleet) -> None:
    rig = await start_fleet(BAD_METRICS=1, HANG="2@1", workers=QUICK)
    await rig.ready()
    task = await ask_something(rig)
    assert "no token and no CPU time" in await replaced(rig, time.time())
    async with asyncio.timeout(SECONDS):
        with pytest.raises(UpstreamError):
            await task
