from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import ConfigError
from citadel_supervisor.placement import Placement, place
from citadel_supervisor.topology import Topology, read_topology


def settings(cores: list[int | tuple[int, bool]], reserved: int = 0, oversubscribe: bool = False) -> Settings:
    """Models "m0", "m1", ... with so many cores each; (cores, False) is one that is not enabled."""
    models: dict[str, Any] = {}
    for number, wanted in enumerate(cores):
        count, enabled = wanted if isinstance(wanted, tuple) else (wanted, True)
        models[f"m{number}"] = {"port": 0, "checkpoint": "/nowhere", "cores": count, "enabled": enabled}
    return Settings.model_validate(
        {"models": models, "gateway": {"cores": reserved}, "workers": {"oversubscribe": oversubscribe}}
    )


def host(count: int) -> Topology:
    return Topology(tuple(range(count)))


def test_models_get_cores_of_their_own_in_configuration_order() -> None:
    placed = place(settings([8, 4, 4, 2], reserved=4), host(24))
    assert placed.cpus == {
        "m0": tuple(range(4, 12)), "m1": tuple(range(12, 16)), "m2": tuple(range(16, 20)), "m3": (20, 21),
    }  # fmt: skip
    assert placed.threads == {"m0": 8, "m1": 4, "m2": 4, "m3": 2}
    assert not placed.shared


def test_the_cores_are_those_this_process_may_use() -> None:
    assert place(settings([2]), Topology((3, 5, 9))).cpus == {"m0": (3, 5)}
    assert set(read_topology().cpus) == os.sched_getaffinity(0)


def test_too_few_cores_are_refused_with_the_numbers_and_what_to_do() -> None:
    with pytest.raises(ConfigError) as refused:
        place(settings([2, 2], reserved=1), host(4))
    (problem,) = refused.value.problems
    assert "ask for 4 cores and the gateway for 1, this host has 4" in problem
    assert "workers.oversubscribe: true" in problem


def test_sharing_goes_round_and_never_gives_an_engine_more_threads_than_cores() -> None:
    placed = place(settings([1, 1, 1, 1], oversubscribe=True), host(2))
    assert placed.cpus == {"m0": (0,), "m1": (1,), "m2": (0,), "m3": (1,)}
    assert placed.shared
    big = place(settings([8, 2], oversubscribe=True), host(4))
    assert big.cpus["m0"] == (0, 1, 2, 3) and big.threads["m0"] == 4
    assert len(big.cpus["m1"]) == 2


def test_a_host_with_nothing_but_the_gateways_cores_is_shared() -> None:
    assert place(settings([1], reserved=4, oversubscribe=True), host(2)).cpus == {"m0": (0,)}


def test_models_that_are_not_enabled_take_nothing_from_those_that_are() -> None:
    placed = place(settings([2, (1, False), 2]), host(4))
    assert placed.cpus["m0"] == (0, 1) and placed.cpus["m2"] == (2, 3)
    assert len(placed.cpus["m1"]) == 1, "it can be started by an operator all the same"
    assert list(placed.cpus) == ["m0", "m1", "m2"]


@given(
    wanted=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6),
    reserved=st.integers(0, 3),
    count=st.integers(1, 16),
    oversubscribe=st.booleans(),
)
def test_whatever_is_asked(
    wanted: list[tuple[int, bool]], reserved: int, count: int, oversubscribe: bool
) -> None:
    asked = sum(cores for cores, enabled in wanted if enabled)
    fits = asked <= max(0, count - reserved)
    try:
        placed: Placement = place(settings([*wanted], reserved, oversubscribe), host(count))
    except ConfigError:
        assert not fits and not oversubscribe
        return
    assert placed.shared is not fits
    assert list(placed.cpus) == list(placed.threads) == [f"m{n}" for n in range(len(wanted))]
    used: list[int] = []
    for (cores, enabled), mask, threads in zip(
        wanted, placed.cpus.values(), placed.threads.values(), strict=True
    ):
        assert 1 <= threads == len(set(mask)) <= cores and list(mask) == sorted(mask)
        assert set(mask) <= set(range(count))
        if reserved < count:
            assert not set(mask) & set(range(reserved)), "the gateway's cores are kept free"
        used += mask if enabled else ()
    if fits:
        assert len(used) == len(set(used)) == asked, "no two engines share a core"
