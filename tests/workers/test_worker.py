"""The lifecycle by itself: generations without processes, and every order of things."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from citadel_supervisor.errors import CannotEverStart, CommandRefused, LaunchError, NotReady
from citadel_supervisor.events import WorkerExited
from citadel_supervisor.states import TRANSITIONS
from citadel_supervisor.states import WorkerState as S
from citadel_supervisor.workers.generation import Emptied
from citadel_supervisor.workers.launch import Fatal, Hello, Loading, Serving
from citadel_supervisor.workers.leases import WorkerLease
from tests.workers.stand_in import Stage


async def test_the_wait_grows_on_the_injected_clock_and_draw() -> None:
    now = 1000.0
    policy = {"backoff": {"initial_s": 40, "factor": 2, "jitter": 0.5, "restarts": 9}}
    async with Stage(policy, clock=lambda: now, random=lambda: 0.75) as stage:
        stage.worker.start()
        await stage.until(S.READY)
        stage.last.exit()
        await stage.until(S.STARTING)
        assert "next start" not in stage.moves()[-2].reason, "the first restart is immediate"
        await stage.until(S.READY)
        now += 599
        stage.last.exit()
        await stage.until(S.BACKING_OFF)
        assert stage.moves()[-1].reason.startswith("next start in 50.0 s; API (pid 100) killed by SIGKILL")
        assert stage.worker.snapshot().restarts == 1


async def test_losses_older_than_the_window_are_forgotten() -> None:
    now = 0.0
    async with Stage(
        {"backoff": {"initial_s": 1e-3, "restarts": 1, "window_s": 60}}, clock=lambda: now
    ) as stage:
        stage.worker.start()
        for _ in range(5):
            await stage.until(S.READY)
            stage.last.exit()
            await stage.until(S.STARTING)
            now += 61
        await stage.until(S.READY)
        now += 1
        stage.last.exit()
        await stage.until(S.STARTING)
        await stage.until(S.READY)
        stage.last.exit()
        await stage.until(S.QUARANTINED)
        assert stage.worker.snapshot().reason.startswith("lost 2 generations within 60 s; the last: API")


async def test_a_process_that_cannot_be_made_is_tried_again_or_not_as_it_says() -> None:
    async with Stage() as stage:
        stage.start_fails = LaunchError("no more processes")
        stage.worker.start()
        await stage.until(S.BACKING_OFF)
        assert "no more processes" in stage.worker.snapshot().reason
        stage.start_fails = CannotEverStart("vLLM refuses the engine arguments")
        await stage.until(S.QUARANTINED)
        assert stage.worker.snapshot().reason == "vLLM refuses the engine arguments"


@pytest.mark.parametrize("before", ["exit", "after"])
async def test_the_first_fatal_report_is_the_reason_whenever_it_comes(before: str) -> None:
    async with Stage(by_itself=False, slow_end=True) as stage:
        stage.worker.start()
        await stage.until(S.STARTING)
        stage.last.report(Hello(100))
        if before == "after":
            stage.last.exit()
            await stage.until(S.FAILED)
        stage.last.report(Fatal("the cause", permanent=True))
        stage.last.report(Fatal("a consequence", permanent=False))
        stage.last.exit()
        await stage.until(S.FAILED)
        await stage.quiet()
        assert stage.worker.snapshot().reason == "the cause"
        stage.last.may_end.set()
        await stage.until(S.QUARANTINED)
        assert stage.worker.snapshot().reason == "the cause"


async def test_the_code_for_no_use_counts_even_when_the_core_was_seen_to_end_first() -> None:
    async with Stage(by_itself=False, slow_end=True) as stage:
        stage.worker.start()
        await stage.until(S.STARTING)
        stage.last.exit("engine core", 0)
        stage.last.exit("API", 78)
        await stage.quiet()
        stage.last.may_end.set()
        await stage.until(S.QUARANTINED)


async def test_a_pipe_that_closes_is_a_loss_only_where_no_process_is_known() -> None:
    async with Stage(by_itself=False) as stage:
        stage.worker.start()
        await stage.until(S.STARTING)
        stage.worker._inbox.put_nowait(Emptied(1))
        await stage.until(S.BACKING_OFF)
        assert "ended before they reported" in stage.worker.snapshot().reason
        await stage.until(S.STARTING)
        stage.last.come_up()
        await stage.until(S.READY)
        stage.worker._inbox.put_nowait(Emptied(2))
        await stage.quiet()
        assert stage.worker.snapshot().state is S.READY, "its exit would be seen by itself"


async def test_news_of_an_old_generation_is_no_news() -> None:
    async with Stage() as stage:
        stage.worker.start()
        await stage.until(S.READY)
        stage.worker.restart(0)
        await stage.until(S.STOPPING)
        await stage.until(S.READY)
        old = stage.generations[0]
        old.exit()
        old.report(Fatal("old", permanent=True))
        stage.worker.unhealthy(1, "old")
        await stage.quiet()
        assert stage.worker.snapshot().state is S.READY
        assert [e for e in stage.events if isinstance(e, WorkerExited)] == []


async def test_stop_and_loss_differ_in_grace() -> None:
    async with Stage({"stop_grace_s": 7}) as stage:
        stage.worker.start()
        await stage.until(S.READY)
        stage.worker.unhealthy(1, "hung")
        await stage.until(S.STARTING)
        await stage.until(S.READY)
        stage.worker.stop(0)
        assert (await stage.worker.settled()).state is S.STOPPED
        assert [generation.graces for generation in stage.generations] == [[0], [7]]


async def test_a_stop_with_a_reason_shows_it() -> None:
    async with Stage() as stage:
        stage.worker.start()
        await stage.until(S.READY)
        stage.worker.stop(0, "disabled in the configuration")
        seen = await stage.worker.settled()
        assert (seen.state, seen.reason) == (S.STOPPED, "disabled in the configuration")
        with pytest.raises(CommandRefused, match="is stopped; only a ready one"):
            stage.worker.drain()


async def test_an_operators_start_ends_a_wait() -> None:
    async with Stage({"backoff": {"initial_s": 1000, "restarts": 9}}) as stage:
        stage.worker.start()
        for _ in range(2):
            await stage.until(S.READY)
            stage.last.exit()
            await stage.until(S.FAILED)
        await stage.until(S.BACKING_OFF)
        waiting = asyncio.create_task(stage.worker.lease(60))
        await stage.quiet()
        assert not waiting.done(), "a request waits for the next generation"
        stage.worker.start()
        lease = await asyncio.wait_for(waiting, 10)
        assert lease.generation == 3
        lease.release()


async def test_stop_ends_the_wait_of_requests_too() -> None:
    async with Stage(by_itself=False) as stage:
        stage.worker.start()
        await stage.until(S.STARTING)
        waiting = asyncio.create_task(stage.worker.lease(60))
        await stage.quiet()
        stage.worker.stop(0)
        with pytest.raises(NotReady):
            await asyncio.wait_for(waiting, 1)


async def test_a_client_that_stops_waiting_is_not_counted() -> None:
    async with Stage(by_itself=False) as stage:
        stage.worker.start()
        await stage.until(S.STARTING)
        waiting = [asyncio.create_task(stage.worker.lease(60)) for _ in range(3)]
        await stage.quiet()
        assert stage.worker.snapshot().waiting_requests == 3
        waiting[0].cancel()
        await stage.quiet()
        assert stage.worker.snapshot().waiting_requests == 2
        stage.last.come_up()
        leases = await asyncio.gather(*waiting[1:])
        assert stage.worker.snapshot().active_requests == 2
        for lease in leases:
            lease.release()


async def test_the_end_of_the_task_ends_the_generation_and_tells_requests() -> None:
    async with Stage() as stage:
        stage.worker.start()
        await stage.until(S.READY)
        lease = await stage.worker.lease(0)
    assert stage.last.ended and stage.last.graces == [0]
    assert await lease.lost == "the supervisor is stopping"


async def test_a_bug_in_the_handling_costs_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Stage() as stage:
        stage.worker.start()
        await stage.until(S.READY)
        monkeypatch.setattr(stage.worker, "_on_report", lambda report: 1 / 0)
        stage.last.report(Loading("weights"))
        await stage.until(S.FAILED)
        monkeypatch.undo()
        assert "ZeroDivisionError" in stage.worker.snapshot().reason
        await stage.until(S.READY)
        assert stage.worker.snapshot().generation == 2


# Every order of things.

Step = Callable[[Stage, list[WorkerLease]], None]


def _drain(stage: Stage, held: list[WorkerLease]) -> None:
    with contextlib.suppress(CommandRefused):
        stage.worker.drain()


def _lease(stage: Stage, held: list[WorkerLease]) -> None:
    if stage.worker.snapshot().state is S.READY:
        taking = stage.worker.lease(0)
        try:
            taking.send(None)
        except StopIteration as done:
            held.append(done.value)


def _answer(text: str) -> Step:
    def step(stage: Stage, held: list[WorkerLease]) -> None:
        if stage.generations and not stage.last.verified.done():
            stage.last.verified.set_result(text)

    return step


def _to_last(act: Callable[[Stage], None]) -> Step:
    return lambda stage, held: act(stage) if stage.generations else None


STEPS: dict[str, Step] = {
    "start": lambda stage, held: stage.worker.start(),
    "stop": lambda stage, held: stage.worker.stop(0),
    "stop after requests": lambda stage, held: stage.worker.stop(60),
    "restart": lambda stage, held: stage.worker.restart(0),
    "restart after requests": lambda stage, held: stage.worker.restart(60),
    "drain": _drain,
    "a request": _lease,
    "a request is over": lambda stage, held: held.pop().release() if held else None,
    "unhealthy": lambda stage, held: stage.worker.unhealthy(stage.worker.snapshot().generation, "hung"),
    "hello": _to_last(lambda stage: stage.last.report(Hello(100))),
    "serving": _to_last(lambda stage: stage.last.report(Serving())),
    "comes up": _to_last(lambda stage: stage.last.come_up()),
    "fatal": _to_last(lambda stage: stage.last.report(Fatal("fatal", permanent=True))),
    "API ends": _to_last(lambda stage: stage.last.exit()),
    "API ends for good": _to_last(lambda stage: stage.last.exit("API", 78)),
    "core ends": _to_last(lambda stage: stage.last.exit("engine core")),
    "right answer": _answer("right"),
    "wrong answer": _answer("wrong"),
    "all is ended": _to_last(lambda stage: stage.last.may_end.set()),
}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3)), max_size=40))
def test_no_order_of_things_breaks_the_lifecycle(steps: list[tuple[str, int]]) -> None:
    bugs: list[str] = []
    sink = logger.add(bugs.append, level="ERROR", format="{message}")
    try:
        asyncio.run(_live_through(steps))
    finally:
        logger.remove(sink)
    assert bugs == []


async def _live_through(steps: list[tuple[str, int]]) -> None:
    held: list[WorkerLease] = []
    async with Stage(by_itself=False, slow_end=True) as stage:
        for name, turns in steps:
            STEPS[name](stage, held)
            for _ in range(turns):  # so that steps fall into the middle of what earlier ones began
                await asyncio.sleep(0)
        stage.slow_end = False
        for generation in stage.generations:
            generation.may_end.set()
        for lease in held:
            lease.release()
        stage.worker.stop(0)
        async with asyncio.timeout(10):
            seen = await stage.worker.settled()
        assert seen.state is S.STOPPED and seen.active_requests == seen.waiting_requests == 0
        assert all(generation.ended for generation in stage.generations)
        assert all(lease.lost.done() for lease in held)
        before = S.STOPPED
        for move in stage.moves():
            assert move.before is before and move.after in TRANSITIONS[before]
            before = move.after
        stage.by_itself = True
        stage.worker.start()
        async with asyncio.timeout(10):
            assert (await stage.worker.settled()).state is S.READY, "whatever was before, it can start"
