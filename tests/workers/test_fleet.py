"""The set of workers: together at start and stop, apart in everything else."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.errors import UnknownModel
from citadel_supervisor.placement import place
from citadel_supervisor.states import WorkerState as S
from citadel_supervisor.topology import read_topology
from citadel_supervisor.workers.memory import proportional_set_size, tree_memory
from citadel_supervisor.workers.process import read_process
from tests.conftest import processes_of
from tests.workers.conftest import StartFleet
from tests.workers.rig import SECONDS, Rig, complete, make_rig, session_of


async def test_all_come_up_and_all_are_stopped_together(start_fleet: StartFleet, run_dir: Path) -> None:
    rig = await start_fleet({"alpha": {}, "beta": {}, "gamma": {"enabled": False}}, IGNORE_SIGTERM=1,
                            workers={"stop_grace_s": 0.3})  # fmt: skip
    assert not rig.fleet.all_ready()
    async with asyncio.timeout(SECONDS):
        await rig.fleet.settled()
    assert rig.fleet.all_ready(), "one that is not enabled does not count"
    assert rig.fleet.workers["gamma"].snapshot().state is S.STOPPED
    assert list(rig.fleet.workers) == ["alpha", "beta", "gamma"]
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(SECONDS):
        await rig.fleet.stop(0)
    assert processes_of(run_dir) == []
    assert {worker.snapshot().reason for worker in rig.fleet.workers.values()} == {
        "the supervisor is stopping", "",
    }  # fmt: skip
    stopping = [rig.log.moves(name)[-2] for name in ("alpha", "beta")]
    assert {move.after for move in stopping} == {S.STOPPING}
    assert abs(stopping[0].at - stopping[1].at) < 0.3, "they are stopped at once, not in turn"
    assert asyncio.get_running_loop().time() - began < 3


async def test_a_fleet_that_is_ended_ends_its_workers_whatever_they_do(
    start_fleet: StartFleet, run_dir: Path
) -> None:
    os.mkfifo(run_dir / "gate")
    stuck = {"env": {"FAKE_GATE": str(run_dir / "gate")}}
    rig = await start_fleet({"alpha": {}, "beta": stuck})
    await rig.ready()
    await rig.log.move(S.LOADING, "beta")
    lease = await rig.alpha.lease(0)
    await rig.close()
    assert processes_of(run_dir) == []
    assert await lease.lost == "the supervisor is stopping"
    rig._task = None


async def test_an_unknown_model_is_told_the_known_ones(start_fleet: StartFleet) -> None:
    rig = await start_fleet({"alpha": {}, "beta": {"enabled": False}})
    assert rig.fleet.worker("alpha") is rig.alpha
    with pytest.raises(UnknownModel, match="model 'gamma' does not exist; known: alpha, beta"):
        rig.fleet.worker("gamma")


async def test_without_forked_models_there_is_no_zygote(start_fleet: StartFleet) -> None:
    rig = await start_fleet()
    assert rig.fleet.zygote is None and rig.fleet.zygote_status().state == "off"


def reconfigured(rig: Rig, run_dir: Path, changed: list[str], **models: dict[str, Any]) -> None:
    """Apply other settings of the models."""
    old = {
        name: model.model_dump(exclude_unset=True) | models.get(name, {})
        for name, model in rig.settings.models.items()
    }
    settings = make_rig(run_dir, old).settings
    rig.fleet.apply(settings, place(settings, read_topology()), changed)


async def test_a_changed_model_gets_a_new_generation_and_others_keep_theirs(
    start_fleet: StartFleet, run_dir: Path
) -> None:
    rig = await start_fleet({"alpha": {}, "beta": {}, "gamma": {"enabled": False}})
    alpha, beta = await rig.ready(), await rig.ready("beta")
    env = rig.settings.models["alpha"].env | {"FAKE_TEXT": "Rome"}
    reconfigured(rig, run_dir, ["alpha", "gamma"], alpha={"env": env}, gamma={"enabled": True})
    again = await rig.ready_again(2)
    assert again.restarts == 0 and again.pid != alpha.pid
    assert (await rig.ready("gamma")).generation == 1
    assert rig.fleet.workers["beta"].snapshot().pid == beta.pid
    lease = await rig.alpha.lease(0)
    assert b"Rome" in (await complete(lease.address))[1]
    lease.release()


async def test_a_model_that_is_disabled_is_stopped_and_one_an_operator_stopped_stays_so(
    start_fleet: StartFleet, run_dir: Path
) -> None:
    rig = await start_fleet({"alpha": {}, "beta": {}})
    await rig.ready()
    await rig.ready("beta")
    rig.fleet.workers["beta"].stop(0)
    await rig.settled("beta")
    reconfigured(rig, run_dir, ["alpha", "beta"], alpha={"enabled": False}, beta={"max_model_len": 99})
    alpha, beta = await rig.settled(), await rig.settled("beta")
    assert (alpha.state, alpha.reason) == (S.STOPPED, "disabled in the configuration")
    assert (beta.state, beta.generation) == (S.STOPPED, 1)
    rig.fleet.workers["beta"].start()
    await rig.ready("beta")
    generation = rig.fleet.workers["beta"].generation
    assert generation is not None and "--max-model-len=99" in generation.spec.argv, (
        "it starts with the new ones"
    )


async def test_memory_is_that_of_the_whole_tree(start_fleet: StartFleet) -> None:
    megabytes = 50
    rig = await start_fleet({"alpha": {}, "beta": {"enabled": False}}, MEMORY=megabytes * 10**6)
    seen = await rig.ready()
    assert seen.pid is not None and seen.core_pid is not None
    used = tree_memory({"alpha": seen.pid, "beta": None})
    assert used["beta"] == 0
    assert megabytes * 10**6 < used["alpha"] < (megabytes + 100) * 10**6
    assert used["alpha"] == pytest.approx(
        sum(map(proportional_set_size, (seen.pid, seen.core_pid))), rel=0.05
    )
    assert proportional_set_size(2**22 - 1) == 0


async def test_memory_that_grows_is_seen(start_fleet: StartFleet) -> None:
    rig = await start_fleet(MEMORY_GROWTH=20 * 10**6)
    seen = await rig.ready()
    before = tree_memory({"alpha": seen.pid})["alpha"]
    lease = await rig.alpha.lease(0)
    for _ in range(3):
        assert (await complete(lease.address))[0] == 200
    lease.release()
    assert tree_memory({"alpha": seen.pid})["alpha"] - before > 55 * 10**6


async def test_the_fleet_measures_and_sweeps_by_itself(
    start_fleet: StartFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("citadel_supervisor.workers.fleet.LOOK_EVERY_S", 0.02)
    rig = await start_fleet(STRAY_CHILDREN=2)
    seen = await rig.ready()
    assert seen.pid is not None and seen.core_pid is not None
    async with asyncio.timeout(SECONDS):
        while not rig.fleet.memory.get("alpha") or len(processes_of(rig.settings.runtime)) > 2:
            await asyncio.sleep(0.01)
    assert sorted(session_of(seen.pid)) == sorted([seen.pid, seen.core_pid]), "the worker itself is let be"


async def test_a_watch_that_breaks_goes_on(start_fleet: StartFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("citadel_supervisor.workers.watch.read_process", lambda pid: 1 / 0)
    rig = await start_fleet(workers={"health": {"check_interval_s": 0.01}})
    seen = await rig.ready()
    assert seen.pid is not None and read_process(seen.pid) is not None
    os.kill(seen.pid, signal.SIGKILL)
    await rig.ready_again(2)
    assert not rig.crashed
