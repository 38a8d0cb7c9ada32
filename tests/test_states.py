from __future__ import annotations

from citadel_supervisor import states
from citadel_supervisor.states import (
    COMING_UP,
    HAS_PROCESS,
    SETTLED,
    TRANSITIONS,
    Progress,
    WorkerSnapshot,
    WorkerState,
)

S = WorkerState


def reachable(start: WorkerState, without: WorkerState | None = None) -> set[WorkerState]:
    """What can come after `start`, on ways that avoid `without`."""
    seen, new = {start}, [start]
    while new:
        more = TRANSITIONS[new.pop()] - seen - {without}
        seen |= more
        new += more
    return seen


def test_every_state_has_its_moves_and_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(S)
    assert reachable(S.STOPPED) == set(S)
    assert all(S.STOPPED in reachable(state) for state in S), "nothing is for ever"
    assert all(state not in after for state, after in TRANSITIONS.items())


def test_only_an_engine_that_was_checked_becomes_ready() -> None:
    assert S.READY not in reachable(S.STOPPED, without=S.VERIFYING)


def test_a_new_generation_begins_only_when_no_process_is_left() -> None:
    before_starting = {state for state, after in TRANSITIONS.items() if S.STARTING in after}
    ending = {S.STOPPING, S.FAILED}
    assert before_starting <= ending | (set(S) - HAS_PROCESS)
    without_process = set(S) - HAS_PROCESS
    into = {state for state in HAS_PROCESS if TRANSITIONS[state] & without_process}
    assert into == ending, "and only ending a tree leads to a state without one"


def test_named_sets() -> None:
    assert {S.READY, S.STOPPED, S.QUARANTINED} == SETTLED
    assert S.READY not in COMING_UP and S.STOPPED not in COMING_UP and S.QUARANTINED not in COMING_UP
    assert set() == COMING_UP & SETTLED
    assert all(S.READY in reachable(state) for state in COMING_UP)
    assert set(S) - {S.STOPPED, S.BACKING_OFF, S.QUARANTINED} == states.HAS_PROCESS


def test_names_are_what_operators_type() -> None:
    assert [str(state) for state in S] == [
        "stopped", "starting", "loading", "verifying", "ready",
        "draining", "stopping", "failed", "backing_off", "quarantined",
    ]  # fmt: skip


def test_progress_is_readable() -> None:
    assert Progress().text() == ""
    assert Progress("kv_cache").text() == "kv cache"
    assert Progress("weights", 121_500_000, 269_060_552).text() == "weights 45 % (121 of 269 MB)"
    assert Progress("weights", 0, 269_060_552).text() == "weights 0 % (0 of 269 MB)"


def test_a_snapshot_knows_whether_it_takes_requests() -> None:
    assert WorkerSnapshot("m", state=S.READY).ready
    assert not any(WorkerSnapshot("m", state=state).ready for state in S if state is not S.READY)
