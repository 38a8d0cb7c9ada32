"""Fleets for tests, and the promise that each leaves nothing behind."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import uvloop
from loguru import logger

from citadel_supervisor.workers.parentage import become_subreaper
from citadel_supervisor.workers.process import own_children
from tests.conftest import processes_of
from tests.workers.rig import Rig, make_rig, zombies


def pytest_asyncio_loop_factories(config: object, item: object) -> Mapping[str, Callable[[], Any]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True, scope="session")
def plain_log() -> None:
    """Without the values of variables, a failing test can be read."""
    logger.remove()
    logger.add(sys.stderr, diagnose=False, backtrace=False)


class StartFleet(Protocol):
    """Starts a fleet of fake engines: other keywords than `workers` and `models` are flags of the engines."""

    def __call__(
        self,
        models: Mapping[str, Mapping[str, Any]] | None = None,
        workers: Mapping[str, Any] | None = None,
        **flags: object,
    ) -> Awaitable[Rig]: ...


@pytest.fixture
async def start_fleet(run_dir: Path, fake_engine: Path) -> AsyncIterator[StartFleet]:
    """Fleets that are ended after the test; then no process, zombie, socket or file of theirs is left."""
    become_subreaper()
    before = {entry.pid for entry in own_children()}  # what an earlier test left is not this one's
    rigs: list[Rig] = []

    async def start(
        models: Mapping[str, Mapping[str, Any]] | None = None,
        workers: Mapping[str, Any] | None = None,
        **flags: object,
    ) -> Rig:
        env = {f"FAKE_{name}": str(value) for name, value in flags.items()}
        fakes = {
            name: {"python": str(fake_engine), "env": env, **model}
            for name, model in (models or {"alpha": {}}).items()
        }
        rig = make_rig(run_dir, fakes, **(workers or {}))
        rigs.append(rig)
        await rig.run()
        return rig

    yield start
    crashed = [rig for rig in rigs if rig.crashed]
    for rig in rigs:
        await rig.close()
    unreaped = [pid for pid in zombies() if pid not in before]
    for pid in unreaped:  # else they would count against later tests as well
        os.waitpid(pid, 0)
    assert not crashed, "the fleet itself ended during the test"
    assert processes_of(run_dir) == []
    assert unreaped == []
    assert os.listdir(run_dir / "workers") == []
