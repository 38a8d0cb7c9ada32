from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from citadel_supervisor.events import (
    Audit,
    Event,
    EventBus,
    Notice,
    RequestDone,
    Transition,
    WorkerExited,
    as_dict,
)
from citadel_supervisor.states import WorkerState

REQUEST = RequestDone(
    request_id="r", model="m", endpoint="/v1/completions", status=200, duration_s=1.5, first_byte_s=None,
    generation=1, attempts=1, streamed=False,
)  # fmt: skip
EVENTS: list[Event] = [
    Transition(model="m", generation=1, before=WorkerState.STARTING, after=WorkerState.LOADING),
    WorkerExited(model="m", generation=1, part="API", pid=7, status=-9, expected=False),
    REQUEST,
    Audit(uid=0, pid=7, action="stop", target="m", outcome="ok"),
    Notice(level="INFO", text="hello"),
]


def note(number: int) -> Notice:
    return Notice(level="INFO", text=str(number))


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_every_event_is_plain_data_with_its_kind_first(event: Event) -> None:
    data = json.loads(json.dumps(as_dict(event)))
    assert next(iter(data)) == "kind" and data["kind"] == event.kind
    assert set(data) == {"kind", *(field.name for field in dataclasses.fields(event))}
    assert data["at"] > 1.7e9
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.at = 0.0  # type: ignore[misc]


def test_kinds_differ() -> None:
    assert len({event.kind for event in EVENTS}) == len(EVENTS)


def test_each_consumer_gets_each_event_in_order_until_it_leaves() -> None:
    bus = EventBus()
    first: list[Event] = []
    second: list[Event] = []
    bus.subscribe(first.append)
    leave = bus.subscribe(second.append)
    bus.publish(EVENTS[0])
    leave()
    bus.publish(EVENTS[2])
    assert first == [EVENTS[0], EVENTS[2]] and second == [EVENTS[0]]


def test_a_consumer_that_raises_is_reported_and_costs_the_others_nothing() -> None:
    failures: list[Exception] = []
    seen: list[Event] = []
    bus = EventBus(on_error=failures.append)

    def broken(_event: Event) -> None:
        raise RuntimeError("broken")

    bus.subscribe(broken)
    bus.subscribe(seen.append)
    bus.publish(EVENTS[0])
    assert [str(failure) for failure in failures] == ["broken"] and seen == [EVENTS[0]]
    silent = EventBus()
    silent.subscribe(broken)
    silent.publish(EVENTS[0])


def test_a_consumer_may_leave_while_it_is_called() -> None:
    bus = EventBus()
    seen: list[Event] = []
    leaving: list[Any] = []

    def once(event: Event) -> None:
        seen.append(event)
        leaving[0]()

    leaving.append(bus.subscribe(once))
    bus.subscribe(seen.append)
    bus.publish(EVENTS[0])
    bus.publish(EVENTS[1])
    assert seen == [EVENTS[0], EVENTS[0], EVENTS[1]]


def test_the_last_events_are_kept_but_for_requests() -> None:
    bus = EventBus(keep=3)
    for number in range(5):
        bus.publish(note(number))
        bus.publish(REQUEST)
    assert texts(bus.recent()) == ["2", "3", "4"] and len(bus.recent()) == 3


async def test_following_gives_what_comes_and_ends_with_the_reader() -> None:
    bus = EventBus()
    bus.publish(note(0))
    seen: list[Event] = []
    both = asyncio.Event()

    async def follow() -> None:
        async for event in bus.follow():
            seen.append(event)
            if len(seen) == 2:
                both.set()

    reader = asyncio.create_task(follow())
    await asyncio.sleep(0)
    for event in (note(1), REQUEST, note(2)):
        bus.publish(event)
    await asyncio.wait_for(both.wait(), 5)
    assert texts(seen) == ["1", "2"]
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    bus.publish(note(3))
    assert bus._consumers == [], "nothing is kept for a reader that has left"


async def test_a_reader_that_is_far_behind_loses_the_oldest() -> None:
    bus = EventBus()
    following = bus.follow(limit=3)
    first = asyncio.ensure_future(anext(following))
    await asyncio.sleep(0)
    for number in range(10):
        bus.publish(note(number))
    seen = [await asyncio.wait_for(first, 5), await anext(following), await anext(following)]
    assert texts(seen) == ["7", "8", "9"]
    await following.aclose()  # type: ignore[attr-defined]
