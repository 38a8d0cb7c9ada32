"""Workers forked from a warm process, which may die, fail or do nothing: a fake one, once the real one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.checkpoints.cache import checkpoint_dir
from citadel_supervisor.states import WorkerState as S
from citadel_supervisor.workers.process import Orphans, read_process
from citadel_supervisor.workers.zygote import ZygoteStatus
from tests.conftest import processes_of
from tests.workers.conftest import StartFleet
from tests.workers.rig import SECONDS, Rig, ask, complete, ended, session_of, zombies

ROOT = Path(__file__).parents[2]
ForkFleet = Callable[..., Awaitable[Rig]]


@pytest.fixture
def fork_fleet(start_fleet: StartFleet, monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> ForkFleet:
    """A fleet whose workers are forked from the fake zygote; flags hold for all of them."""
    monkeypatch.setattr("citadel_supervisor.workers.zygote.ZYGOTE_MODULE", "tests.workers.fake_zygote")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    async def start(*names: str, **flags: object) -> Rig:
        for name, value in flags.items():
            monkeypatch.setenv(f"FAKE_{name}", str(value))
        models: dict[str, dict[str, Any]] = {
            name: {"python": None, "env": {}} for name in names or ("alpha",)
        }
        return await start_fleet(models)

    return start


async def zygote_is(rig: Rig, state: str, other_than: int | None = None) -> ZygoteStatus:
    """Wait for that; the zygote tells nobody, so it is asked again and again."""
    async with asyncio.timeout(SECONDS):
        while True:
            status = rig.fleet.zygote_status()
            if status.state == state and (status.pid != other_than or other_than is None):
                return status
            await asyncio.sleep(0.005)


async def test_a_worker_is_forked_and_becomes_a_child_of_the_supervisor(fork_fleet: ForkFleet) -> None:
    rig = await fork_fleet()
    seen = await rig.ready()
    assert seen.launch == "zygote" and seen.pid is not None and seen.core_pid is not None
    api = read_process(seen.pid)
    assert api is not None and (api.ppid, api.session) == (os.getpid(), seen.pid)
    assert (await zygote_is(rig, "ready")).pid != seen.pid
    lease = await rig.alpha.lease(0)
    assert (await complete(lease.address))[0] == 200
    lease.release()
    assert rig.fleet._orphans.starting == 0


async def test_launches_wait_for_a_zygote_that_is_loading(fork_fleet: ForkFleet, run_dir: Path) -> None:
    os.mkfifo(run_dir / "zygote-gate")
    rig = await fork_fleet(ZYGOTE_FIFO=run_dir / "zygote-gate")
    await rig.log.move(S.STARTING)
    assert rig.fleet.zygote_status().state == "loading"
    gate = os.open(run_dir / "zygote-gate", os.O_RDWR)
    os.write(gate, b".")
    assert (await rig.ready()).restarts == 0
    os.close(gate)


async def test_a_killed_zygote_is_replaced_and_its_workers_live_on(fork_fleet: ForkFleet) -> None:
    rig = await fork_fleet("alpha", "beta")
    alpha, beta = await rig.ready(), await rig.ready("beta")
    first = await zygote_is(rig, "ready")
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second = await zygote_is(rig, "ready", other_than=first.pid)
    assert second.pid is not None and second.preload_s is not None
    assert [rig.fleet.workers[name].snapshot().pid for name in ("alpha", "beta")] == [alpha.pid, beta.pid]
    rig.alpha.restart(0)
    again = await rig.ready_again(2)
    assert (again.launch, again.restarts) == ("zygote", 0)
    assert session_of(first.pid) == []


async def test_a_worker_lost_together_with_the_zygote_waits_for_the_new_one(fork_fleet: ForkFleet) -> None:
    rig = await fork_fleet()
    seen = await rig.ready()
    zygote = await zygote_is(rig, "ready")
    assert zygote.pid is not None and seen.core_pid is not None
    os.kill(zygote.pid, signal.SIGKILL)
    await ended(zygote.pid)
    os.kill(seen.core_pid, signal.SIGKILL)
    assert (await rig.ready_again(2)).restarts == 1, "the want of a zygote costs no restart"


class Impatient:
    """asyncio for one module, with pauses that are noted instead of made."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.enough = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if len(self.pauses) == 7:
            self.enough.set()
        await asyncio.sleep(0)


async def test_a_zygote_that_cannot_load_is_tried_again_more_and_more_slowly(
    fork_fleet: ForkFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = Impatient()
    monkeypatch.setattr("citadel_supervisor.workers.zygote.asyncio", impatient)
    rig = await fork_fleet(ZYGOTE_EXIT=9)
    await rig.log.move(S.BACKING_OFF)
    seen = await rig.settled()
    assert seen.state is S.QUARANTINED
    assert "the zygote ended while loading (exit code 9); see its log" in seen.reason
    async with asyncio.timeout(SECONDS):
        await impatient.enough.wait()
    assert impatient.pauses[:7] == [2, 4, 8, 16, 32, 60, 60]


async def test_a_bad_environment_is_told_to_the_operator(fork_fleet: ForkFleet) -> None:
    rig = await fork_fleet()
    assert rig.fleet.zygote is not None
    await rig.ready()
    rig.fleet.zygote._environment = {"PYTHONHOME": "/nowhere"}
    os.kill((await zygote_is(rig, "ready")).pid or 0, signal.SIGKILL)
    status = await zygote_is(rig, "failed")
    assert "the zygote ended while loading (exit code 1)" in status.reason
    assert rig.alpha.snapshot().state is S.READY


async def test_a_zygote_that_forks_nothing_is_replaced(
    fork_fleet: ForkFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("citadel_supervisor.workers.generation.HELLO_WITHIN_S", 0.5)
    rig = await fork_fleet()
    await rig.ready()
    stopped = (await zygote_is(rig, "ready")).pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    rig.alpha.restart(0)
    failed = await rig.log.move(S.FAILED, generation=2)
    assert "the zygote has not forked within 0.5 s; it is replaced" in failed.reason
    assert (await rig.ready_again(3)).restarts == 1
    assert (await zygote_is(rig, "ready")).pid != stopped
    assert rig.fleet._orphans.starting == 0


async def test_a_fork_that_comes_too_late_is_nobodys_and_ended(
    fork_fleet: ForkFleet, monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    monkeypatch.setattr("citadel_supervisor.workers.generation.HELLO_WITHIN_S", 0.2)
    monkeypatch.setattr(Orphans, "sweep", lambda self: [])  # as if another launch were under way
    os.mkfifo(run_dir / "hello")
    rig = await fork_fleet(ZYGOTE_HELLO=run_dir / "hello")
    await rig.log.move(S.FAILED)
    late = [pid for pid in processes_of(run_dir) if pid != rig.fleet.zygote_status().pid]
    rig.alpha.stop(0)
    await rig.settled()
    gate = os.open(run_dir / "hello", os.O_RDWR)
    os.write(gate, b"." * 20)
    os.close(gate)
    served = run_dir / "workers" / "alpha.1.sock"
    async with asyncio.timeout(SECONDS):
        while not served.exists():  # it has said hello long before
            await asyncio.sleep(0.005)
    monkeypatch.undo()
    monkeypatch.setattr("citadel_supervisor.workers.process.UNCLAIMED_S", 0)
    async with asyncio.timeout(SECONDS):
        while zombies() or set(processes_of(run_dir)) & set(late):
            await rig.fleet._orphans.end_all()
            await asyncio.sleep(0.005)
    assert late, "the test is only one if there are such"
    for path in served.parent.iterdir():
        path.unlink()


async def test_stop_while_the_zygote_is_stuck_ends_after_its_bound(
    fork_fleet: ForkFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("citadel_supervisor.workers.generation.HELLO_WITHIN_S", 0.5)
    rig = await fork_fleet()
    await rig.ready()
    os.kill((await zygote_is(rig, "ready")).pid or 0, signal.SIGSTOP)
    rig.alpha.restart(0)
    await rig.log.move(S.STARTING, generation=2)
    rig.alpha.stop(0)
    assert (await rig.settled()).state is S.STOPPED
    assert rig.fleet._orphans.starting == 0


async def test_stopping_while_the_zygote_loads_is_at_once(fork_fleet: ForkFleet, run_dir: Path) -> None:
    os.mkfifo(run_dir / "zygote-gate")
    rig = await fork_fleet(ZYGOTE_FIFO=run_dir / "zygote-gate")
    await rig.log.move(S.STARTING)
    rig.alpha.stop(0)
    assert (await rig.settled()).state is S.STOPPED


@pytest.mark.engine
async def test_the_real_zygote_forks_a_real_worker(start_fleet: StartFleet, run_dir: Path) -> None:
    model: dict[str, object] = {
        "python": None, "env": {}, "checkpoint": str(checkpoint_dir("SmolLM2-135M-Instruct")),
        "kv_cache": "64MiB", "max_model_len": 256,
    }  # fmt: skip
    rig = await start_fleet({"alpha": model})
    async with asyncio.timeout(90):
        seen = await rig.alpha.settled()
    assert seen.state is S.READY and seen.launch == "zygote", seen
    assert "of the record (float32)" in seen.reason
    zygote = rig.fleet.zygote_status().pid
    assert seen.pid and seen.core_pid and zygote
    assert sorted(processes_of(run_dir)) == sorted([seen.pid, seen.core_pid, zygote]), "each carries the mark"
    titles = [
        Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode() for pid in processes_of(run_dir)
    ]
    assert set(titles) == {
        "citadel: zygote", "citadel: alpha API (generation 1)", "citadel: alpha engine core (generation 1)",
    }  # fmt: skip
    os.kill(zygote, signal.SIGKILL)
    status, body = await ask(
        f"{run_dir}/workers/alpha.1.sock", "POST", "/v1/completions",
        json.dumps({"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}).encode(),
    )  # fmt: skip
    assert status == 200 and b"Paris" in body
    assert rig.alpha.snapshot().generation == 1
