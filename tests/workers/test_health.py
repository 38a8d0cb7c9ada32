"""What readings mean, without processes and without time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citadel_supervisor.config import HealthSettings
from citadel_supervisor.workers.health import Diagnosis, Reading

LIMITS = HealthSettings(stall_s=15, spin_s=600, load_stall_s=120, failures=3)


def readings(seconds: int, **fields: Callable[[int], Any] | Any) -> Iterator[Reading]:
    """One a second; a field may depend on the second."""
    for second in range(seconds):
        values = {name: value(second) if callable(value) else value for name, value in fields.items()}
        yield Reading(at=float(second), **({"loading": False, "work": 0, "cpu_s": 0.0} | values))


def verdict(taken: Iterator[Reading]) -> tuple[float, str] | None:
    """The first verdict and when it came."""
    diagnosis = Diagnosis(LIMITS)
    for reading in taken:
        said = diagnosis.judge(reading)
        if said is not None:
            return reading.at, said
    return None


HEALTHY: dict[str, dict[str, Any]] = {
    "idle": {},
    "tokens without CPU time seen": {"work": 1, "marks": lambda s: (s,)},
    "a token now and then": {"work": 1, "marks": lambda s: (s // 14,)},
    "a long prefill: CPU and no tokens": {"work": 4, "cpu_s": float},
    "a short burst of CPU now and then": {"work": 4, "cpu_s": lambda s: s // 14 * 0.1},
    "loading bytes from a slow disk": {"loading": True, "marks": lambda s: (s // 100,)},
    "loading by computing": {"loading": True, "cpu_s": lambda s: s * 0.5},
    "work that comes and goes": {"work": lambda s: s // 10 % 2},
    "two probes fail now and then": {"failed_probes": lambda s: s % 3},
    "stopped for a moment": {"stopped": lambda s: "engine core" if 100 < s < 110 else ""},
}


@pytest.mark.parametrize("fields", HEALTHY.values(), ids=HEALTHY.keys())
def test_left_alone(fields: dict[str, Any]) -> None:
    assert verdict(readings(599, **fields)) is None


SICK: dict[str, tuple[float, str, dict[str, Any]]] = {
    "no token and no CPU": (16, "no token and no CPU time for 15 s with 2 requests", {"work": 2}),
    "idles on, as timers do": (16, "no token and no CPU time", {"work": 1, "cpu_s": lambda s: s * 0.01}),
    "worked, then stopped": (
        66,
        "no token and no CPU time for 15 s with 1 requests",
        {"work": 1, "marks": lambda s: (min(s, 50),), "cpu_s": lambda s: min(s, 50) * 0.5},
    ),
    "computes for ever": (601, "no token for 600 s", {"work": 1, "cpu_s": float}),
    "loading stands still": (121, "loading made no progress", {"loading": True}),
    "stopped while idle": (
        116,
        "the engine core has been stopped by a signal for 15 s",
        {"stopped": lambda s: "engine core" if s > 100 else ""},
    ),
    "stopped while loading": (16, "the API process has been", {"loading": True, "stopped": "API process"}),
    "three probes fail": (3, "3 health probes in a row failed", {"failed_probes": lambda s: s}),
    "stalls right after loading": (
        66,
        "no token and no CPU time",
        {"loading": lambda s: s < 50, "work": lambda s: int(s >= 50), "marks": lambda s: (min(s, 49),)},
    ),
}


@pytest.mark.parametrize(("at", "said", "fields"), SICK.values(), ids=SICK.keys())
def test_found(at: float, said: str, fields: dict[str, Any]) -> None:
    found = verdict(readings(700, **fields))
    assert found is not None
    assert found[1].startswith("hung: ") and said in found[1]
    assert abs(found[0] - at) <= 1


def test_the_time_without_work_does_not_count() -> None:
    busy_from = 300
    found = verdict(readings(700, work=lambda s: int(s >= busy_from)))
    assert found is not None and busy_from + 15 < found[0] <= busy_from + 17


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.floats(0.05, 1)), max_size=200))
def test_whatever_else_happens_a_working_engine_is_never_hung(steps: list[tuple[bool, int, float]]) -> None:
    diagnosis = Diagnosis(LIMITS)
    tokens = cpu_s = 0.0
    for at, (makes_token, work, used) in enumerate(steps):
        tokens += makes_token
        cpu_s += used
        reading = Reading(at=float(at), loading=False, work=work, cpu_s=cpu_s, marks=(tokens,))
        assert diagnosis.judge(reading) is None
