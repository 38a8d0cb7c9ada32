from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from citadel_supervisor.config import BackoffSettings
from citadel_supervisor.workers.backoff import RestartBudget

MIDDLE = 0.5
"""The draw that leaves a pause as it is."""


def pauses(settings: BackoffSettings, times: list[float], draw: float = MIDDLE) -> list[float | None]:
    budget = RestartBudget(settings)
    return [budget.spend(time, draw) for time in times]


def test_the_first_restart_is_immediate_then_waits_double_up_to_the_longest() -> None:
    settings = BackoffSettings(initial_s=0.5, factor=2, maximum_s=3, restarts=6)
    assert pauses(settings, [0, 1, 2, 3, 4, 5]) == [0, 0.5, 1, 2, 3, 3]


def test_one_loss_too_many_ends_it() -> None:
    settings = BackoffSettings(restarts=2)
    assert [pause is None for pause in pauses(settings, [0, 1, 2])] == [False, False, True]
    assert pauses(BackoffSettings(restarts=0), [0]) == [None]


def test_losses_are_forgotten_after_the_window() -> None:
    settings = BackoffSettings(initial_s=0.5, restarts=2, window_s=100)
    assert pauses(settings, [0, 1, 99.9])[-1] is None
    assert pauses(settings, [0, 1, 100.5]) == [0, 0.5, 0.5], "the first is forgotten"
    assert pauses(settings, [0, 1, 1000]) == [0, 0.5, 0], "all are, and it begins anew"


def test_jitter_is_a_share_of_the_wait_and_never_delays_the_first() -> None:
    settings = BackoffSettings(initial_s=10, jitter=0.2)
    assert pauses(settings, [0, 1], draw=0)[1] == 8
    assert pauses(settings, [0, 1], draw=0.75)[1] == 11
    assert pauses(settings, [0], draw=0.99) == [0]


@given(
    restarts=st.integers(0, 3000),
    factor=st.floats(1, 1e9),
    maximum=st.floats(0.1, 1e6),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_however_often_it_is_lost_the_wait_is_bounded(
    restarts: int, factor: float, maximum: float, draw: float
) -> None:
    settings = BackoffSettings(factor=factor, maximum_s=maximum, restarts=restarts, window_s=1e9)
    seen = pauses(settings, [float(second) for second in range(restarts + 1)], draw)
    assert seen.pop() is None
    assert all(pause is not None and 0 <= pause <= maximum * 1.2 for pause in seen)
