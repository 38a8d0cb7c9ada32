"""Which model answers a request that leaves the choice to the router."""

from __future__ import annotations

from pathlib import Path

import pytest

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import UnknownModel
from citadel_supervisor.gateway.router import Catalog
from citadel_supervisor.states import COMING_UP, WorkerState
from tests.gateway.backends import FakeBackend

S = WorkerState
MODELS = ("alpha", "beta", "gamma")


async def catalog(
    tmp_path: Path, states: dict[str, tuple[WorkerState, int]], default: str | None = None
) -> Catalog:
    """Models in those states, with so many requests at work."""
    models = {name: {"port": 0, "checkpoint": "/x"} for name in MODELS}
    settings = Settings.model_validate(
        {"state_dir": str(tmp_path), "models": models, "default_model": default}
    )
    backends = {name: FakeBackend(name) for name in MODELS}
    for name, (state, requests) in states.items():
        await backends[name].up("/nowhere")
        for _ in range(requests):
            await backends[name].lease(0)
        await backends[name].become(state)
    return Catalog(settings, backends)


@pytest.mark.parametrize(
    ("states", "default", "expected"),
    [
        ([(S.READY, 0), (S.READY, 0), (S.READY, 0)], None, "alpha"),
        ([(S.READY, 0), (S.READY, 0), (S.READY, 0)], "gamma", "gamma"),
        ([(S.READY, 2), (S.READY, 1), (S.READY, 1)], None, "beta"),
        ([(S.READY, 0), (S.READY, 0), (S.READY, 1)], "gamma", "alpha"),
        ([(S.LOADING, 0), (S.READY, 9), (S.DRAINING, 0)], None, "beta"),
        ([(S.READY, 5), (S.FAILED, 0), (S.QUARANTINED, 0)], "beta", "alpha"),
        ([(S.STOPPED, 0), (S.QUARANTINED, 0), (S.LOADING, 0)], None, "gamma"),
        ([(S.BACKING_OFF, 0), (S.LOADING, 0), (S.STOPPED, 0)], None, "alpha"),
        ([(S.BACKING_OFF, 0), (S.LOADING, 0), (S.STOPPED, 0)], "beta", "beta"),
        ([(S.STOPPED, 0), (S.QUARANTINED, 0), (S.DRAINING, 0)], None, "alpha"),
    ],
)
async def test_the_choice(
    tmp_path: Path, states: list[tuple[WorkerState, int]], default: str | None, expected: str
) -> None:
    models = await catalog(tmp_path, dict(zip(MODELS, states, strict=True)), default)
    for name in (None, "", "auto"):
        assert models.resolve(name).model == expected


@pytest.mark.parametrize("state", sorted(COMING_UP))
async def test_any_state_on_the_way_up_is_better_than_none(tmp_path: Path, state: WorkerState) -> None:
    models = await catalog(tmp_path, {"gamma": (state, 0)})
    assert models.resolve(None).model == "gamma"


async def test_a_named_model_is_taken_whatever_its_state(tmp_path: Path) -> None:
    models = await catalog(tmp_path, {"alpha": (S.READY, 0)})
    assert models.resolve("beta").model == "beta"


async def test_an_unknown_name_is_repeated_in_part_only(tmp_path: Path) -> None:
    models = await catalog(tmp_path, {})
    with pytest.raises(UnknownModel) as caught:
        models.resolve("x" * 10_000)
    assert len(str(caught.value)) < 250
    assert caught.value.known == [*MODELS, "auto"]
