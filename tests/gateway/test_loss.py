"""An engine is lost: requests without output go to the next generation, the others end cleanly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from citadel_supervisor.errors import UpstreamLost
from citadel_supervisor.gateway import relay
from citadel_supervisor.gateway.exchange import Exchange
from citadel_supervisor.gateway.router import Chosen
from citadel_supervisor.gateway.upstream import UpstreamPool
from citadel_supervisor.states import WorkerState
from tests.fake_upstream import SECONDS, Call, until
from tests.gateway.client import Client
from tests.gateway.conftest import MakeRig, Rig

CHAT = "/v1/chat/completions"
ENDPOINTS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"]
EVENT = b'data: {"n": 1}\n\n'


async def begun(rig: Rig, path: str = CHAT, body: bytes = b'{"the": "request"}') -> tuple[Client, Call]:
    client = await rig.client()
    client.post(path, body)
    return client, await rig.engine.call()


def dies(call: Call) -> None:
    call.die()


def begins_to_answer(call: Call) -> None:
    call.head(200, [(b"Content-Length", b"10")])
    call.die()


def begins_to_stream(call: Call) -> None:
    call.stream()
    call.die()


def begins_an_event(call: Call) -> None:
    call.stream()
    call.chunk(b'data: {"n"')
    call.die()


def answers_500(call: Call) -> None:
    call.reply(500, b'{"error": {"message": "EngineDeadError"}}')


def streams_an_error(call: Call) -> None:
    call.stream()
    call.chunk(b'data: {"error": {"message": "EngineDeadError"}}\n\ndata: [DONE]\n\n')
    call.end()


def streams_anthropics_error(call: Call) -> None:
    call.stream()
    call.chunk(b'event: error\ndata: {"type":"error","error":{"type":"internal_error"}}\n\n')
    call.end()


def hangs(call: Call) -> None:
    pass


WAYS = [
    dies, begins_to_answer, begins_to_stream, begins_an_event, answers_500, streams_an_error,
    streams_anthropics_error, hangs,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_without_output_is_replayed_once(rig: Rig, way: Callable[[Call], None]) -> None:
    client, call = await begun(rig)
    way(call)
    await rig.alpha.lose()
    await asyncio.wait_for(rig.alpha.waiting.wait(), SECONDS)
    assert not rig.alpha.leases
    engine = await rig.next_generation()
    again = await engine.call()
    assert (again.body, again.target) == (call.body, call.target)
    assert again.header(b"x-request-id") == call.header(b"x-request-id")
    again.reply(200, b"the only output")
    answer = await client.answer()
    assert (answer.status, answer.body, answer.whole) == (200, b"the only output", True)
    assert answer.headers["x-citadel-generation"] == "2"
    record = await rig.done()
    assert (record.status, record.generation, record.attempts) == (200, 2, 2)
    assert (rig.engine.requests, engine.requests) == (1, 1)
    rig.gateway.forget(rig.engine.path)
    await call.gone()


async def test_processes_that_are_gone_are_enough_to_replay(rig: Rig) -> None:
    """The engine reports its own death before the supervisor has heard of it."""
    client, call = await begun(rig)
    rig.alpha.dead.add(1)
    await rig.alpha.become(WorkerState.FAILED)
    answers_500(call)
    engine = await rig.next_generation()
    (await engine.call()).reply(200, b"good")
    assert (await client.answer()).body == b"good"


async def test_a_death_the_worker_has_not_heard_of_is_not_replayed_on_the_same_generation(rig: Rig) -> None:
    client, call = await begun(rig)
    dies(call)
    await until(lambda: rig.alpha.doubted)
    assert rig.alpha.snapshot().ready
    await rig.alpha.lose()
    engine = await rig.next_generation()
    (await engine.call()).reply(200, b"good")
    assert (await client.answer()).body == b"good"
    assert rig.engine.requests == 1


async def test_a_loss_that_is_told_a_little_late_is_enough_too(rig: Rig) -> None:
    client, call = await begun(rig)
    answers_500(call)
    await until(lambda: rig.alpha.doubted)
    await rig.alpha.lose()
    engine = await rig.next_generation()
    (await engine.call()).reply(200, b"good")
    assert (await client.answer()).body == b"good"


@pytest.mark.parametrize("way", [answers_500, streams_an_error])
async def test_an_error_of_a_living_engine_is_passed_on(rig: Rig, way: Callable[[Call], None]) -> None:
    client, call = await begun(rig)
    way(call)
    answer = await client.answer()
    assert answer.status == (500 if way is answers_500 else 200)
    assert b"EngineDeadError" in answer.body
    assert rig.engine.requests == 1


async def test_what_a_model_cannot_do_is_answered_without_a_pause(rig: Rig) -> None:
    client, call = await begun(rig)
    call.reply(501, b"no")
    assert (await client.answer()).status == 501
    assert (await rig.done()).duration_s < 0.2


async def test_a_request_is_replayed_only_so_often(rig: Rig, tmp_path: Path) -> None:
    client, call = await begun(rig)
    dies(call)
    await rig.alpha.lose()
    engine = await rig.next_generation()
    dies(await engine.call())
    await rig.alpha.lose()
    answer = await client.answer()
    assert answer.status == 502
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("upstream_error", "engine_lost")
    assert str(tmp_path) not in error["message"]
    record = await rig.done()
    assert (record.status, record.attempts, record.first_byte_s) == (502, 2, None)


async def test_replaying_can_be_turned_off(make_rig: MakeRig) -> None:
    rig = await make_rig(replays=0)
    client, call = await begun(rig)
    dies(call)
    assert (await client.answer()).status == 502
    assert (await rig.done()).attempts == 1


async def test_an_engine_that_cannot_be_reached_counts_as_lost(rig: Rig) -> None:
    await rig.engine.stop()
    client = await rig.client()
    client.post(CHAT, b"{}")
    await until(lambda: bool(rig.alpha.leases))
    await rig.alpha.lose()
    engine = await rig.next_generation()
    (await engine.call()).reply(200, b"good")
    assert (await client.answer()).body == b"good"


async def test_time_spent_waiting_is_shared_by_all_attempts_time_at_work_is_not(make_rig: MakeRig) -> None:
    rig = await make_rig(restart_wait_s=30.0)
    client, call = await begun(rig)
    dies(call)
    await rig.alpha.lose()
    engine = await rig.next_generation()
    (await engine.call()).reply(200, b"good")
    await client.answer()
    first, second = rig.alpha.waited
    record = await rig.done()
    assert first == 30.0
    assert 30.0 - record.waited_s <= second < 30.0


async def test_no_next_generation_is_said_so(rig: Rig) -> None:
    client, call = await begun(rig)
    dies(call)
    await rig.alpha.lose()
    await rig.alpha.become(WorkerState.QUARANTINED, "five restarts in ten minutes")
    answer = await client.answer()
    assert answer.status == 503
    assert "five restarts in ten minutes" in answer.json()["error"]["message"]
    assert answer.headers["x-citadel-model"] == "alpha"


def sse(data: bytes) -> list[dict[str, str]]:
    """The events of a stream, each as its fields."""
    assert data.endswith(b"\n\n")
    blocks = data.decode()[:-2].split("\n\n")
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("way", ["the connection ends", "the supervisor says so"])
async def test_a_stream_that_has_begun_ends_with_an_error_event(rig: Rig, path: str, way: str) -> None:
    client, call = await begun(rig, path)
    call.stream()
    first = b'event: x\ndata: {"type": "x", "sequence_number": 41}\n\n'
    call.chunk(first)
    await client.head()
    assert await client.chunk() == first
    call.chunk(b'data: {"half an ev')
    if way == "the connection ends":
        call.die()
    else:
        await rig.alpha.lose()
    rest = b""
    while chunk := await client.chunk():
        rest += chunk
    (event,) = sse(rest)
    data = json.loads(event["data"])
    if path == "/v1/messages":
        assert event["event"] == "error"
        assert data["type"] == "error"
        assert data["error"]["type"] == "api_error"
        assert data["error"]["message"]
    elif path == "/v1/responses":
        assert event["event"] == "error"
        assert set(data) == {"type", "code", "message", "param", "sequence_number"}
        assert (data["type"], data["code"], data["sequence_number"]) == ("error", "engine_lost", 42)
    else:
        assert list(event) == ["data"]
        assert set(data["error"]) == {"message", "type", "param", "code"}
        assert data["error"]["code"] == "engine_lost"
    await call.gone()
    record = await rig.done()
    assert (record.status, record.attempts, record.streamed) == (200, 1, True)
    assert rig.engine.requests == 1
    # The client's connection is in order and can be used again.
    rig.engine.answer = lambda call: call.reply(200, b"next")
    await rig.alpha.up(rig.engine.path)
    client.post(CHAT)
    assert (await client.answer()).body == b"next"


@pytest.mark.parametrize(
    "last",
    [
        b"data: [DONE]\n\n",
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
        b'data: {"error": {"message": "EngineDeadError"}}\n\n',
        b'event: error\ndata: {"type":"error"}\n\n',
    ],
)
async def test_a_stream_that_said_its_last_word_gets_no_error_event(rig: Rig, last: bytes) -> None:
    client, call = await begun(rig)
    call.stream()
    call.chunk(EVENT)
    call.chunk(last)
    await client.head()
    got = b""
    while len(got) < len(EVENT + last):
        got += await client.chunk()
    await rig.alpha.lose()
    assert await client.chunk() == b""
    assert got == EVENT + last


async def test_an_answer_that_has_begun_is_cut_visibly(rig: Rig) -> None:
    client, call = await begun(rig)
    call.head(200, [(b"Content-Length", b"100")])
    call.chunk(b"some output")
    head = await client.head()
    assert head.headers["content-length"] == "100"
    await rig.alpha.lose()
    assert await client.closed() == b"some output"
    await call.gone()
    assert (await rig.done()).status == 200
    assert rig.engine.requests == 1


async def test_a_chunked_answer_that_has_begun_gets_no_proper_end(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    client, call = await begun(rig)
    call.head(200, [(b"Content-Type", b"application/json")], chunked=True)
    call.chunk(b'{"some":')
    call.die()
    answer = await client.answer()
    assert (answer.chunks, answer.whole) == ([b'{"some":'], False)
    await rig.done()
    assert not caplog.records


async def test_an_event_too_long_to_hold_leaves_no_clean_end(rig: Rig) -> None:
    client, call = await begun(rig)
    call.stream()
    call.chunk(b"data: " + b"x" * 2_000_000)
    await client.head()
    await client.chunk()
    await rig.alpha.lose()
    with pytest.raises(asyncio.IncompleteReadError):
        while await client.chunk():
            pass


class Prepared(UpstreamPool):
    """Gives out exchanges that the test has brought to some point, one after another."""

    def __init__(self, *exchanges: Exchange) -> None:
        super().__init__()
        self._prepared = list(exchanges)

    def send(self, *request: object) -> Exchange:
        return self._prepared.pop(0)


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
async def test_output_that_came_together_with_the_loss_is_dropped_for_the_replay(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    """Both within one turn of the event loop: the client has seen nothing, so it sees the whole answer."""
    lost, good = (Exchange("/x", b"", b"", bodyless=False) for _ in range(2))
    for exchange, body in ((lost, b"data: half\n\n"), (good, b"data: whole\n\n")):
        exchange.head_came(200, [(b"content-type", kind)])
        exchange.body_came(body)
    lost.fail(UpstreamLost("gone"))
    good.completed()
    monkeypatch.setattr(relay, "GRACE_S", 0.0)
    sent: list[Any] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    class Stays:
        left = answered = False

        def watch(self, on_leave: Callable[[], object] | None) -> None: ...

        def cut(self) -> None: ...

    request = relay.Request(b"r1", CHAT, b"", [], Stays(), 0.0)
    backend = rig.alpha
    await relay.Relay(Prepared(lost, good), rig.settings.gateway).serve(
        request, Chosen("alpha", backend), send
    )
    assert b"".join(message.get("body", b"") for message in sent) == b"data: whole\n\n"
    assert (request.status, request.attempts) == (200, 2)


async def test_others_are_not_touched(rig: Rig) -> None:
    client = await rig.client("beta")
    client.post(CHAT)
    call = await rig.engines["beta"].call()
    await rig.alpha.lose()
    call.reply(200, b"beta's")
    assert (await client.answer()).body == b"beta's"
