"""Relaying: the bytes, the moments at which they pass, and the headers."""

from __future__ import annotations

import asyncio
import json
import os
import uuid

import pytest

from tests.fake_upstream import SECONDS
from tests.gateway.conftest import MakeRig, Rig

CHAT = "/v1/chat/completions"


async def test_a_request_and_its_answer_pass_byte_for_byte(rig: Rig) -> None:
    body = json.dumps({"model": "alpha", "x": "日本語 \u0000 ünïcode"}, ensure_ascii=False).encode()
    client = await rig.client()
    client.post(CHAT + "?a=b%20c", body)
    call = await rig.engine.call()
    assert (call.method, call.target, call.body) == (b"POST", CHAT.encode() + b"?a=b%20c", body)
    reply = b'{"answer": "\xe6\x97\xa5", "odd":   "spacing"}'
    call.reply(200, reply)
    answer = await client.answer()
    assert (answer.status, answer.body, answer.whole) == (200, reply, True)


async def test_the_body_is_not_even_looked_at_on_a_models_own_port(rig: Rig) -> None:
    client = await rig.client("beta")
    client.post(CHAT, b"\xff not json")
    call = await rig.engines["beta"].call()
    assert call.body == b"\xff not json"
    call.reply(400, b'{"error": "the engine\'s own"}')
    answer = await client.answer()
    assert (answer.status, answer.body) == (400, b'{"error": "the engine\'s own"}')


async def test_five_megabytes_pass_whole_both_ways(rig: Rig) -> None:
    body = os.urandom(5_000_000)
    client = await rig.client()
    client.post(CHAT, body)
    call = await rig.engine.call()
    assert call.body == body
    call.reply(200, body)
    assert (await client.answer()).body == body


async def test_a_chunked_request_passes_whole(rig: Rig) -> None:
    client = await rig.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    parts = [b'{"x":"', b"\xe6", b"\x97\xa5", b'"}']
    for part in parts:
        client.send(b"%x\r\n%s\r\n" % (len(part), part))
    client.send(b"0\r\n\r\n")
    call = await rig.engine.call()
    assert call.body == b"".join(parts)
    assert call.header(b"transfer-encoding") is None
    assert call.header(b"content-length") == b"%d" % len(call.body)
    call.reply(200, b"{}")
    assert (await client.answer()).status == 200


async def test_each_event_of_a_stream_passes_before_the_next_is_made(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    call.stream()
    events = [b'data: {"n": %d}\n\n' % n for n in range(5)] + [b"data: [DONE]\n\n"]
    call.chunk(events[0])
    head = await client.head()
    assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert await client.chunk() == events[0]
    for event in events[1:]:
        call.chunk(event)
        assert await client.chunk() == event
    call.end()
    assert await client.chunk() == b""
    assert (await rig.done()).streamed


async def test_chunks_of_any_other_answer_pass_one_by_one_too(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    call.head(200, [(b"Content-Type", b"application/octet-stream")], chunked=True)
    for part in (b"one", b"\n\n", b"\xe6"):
        call.chunk(part)
        if part == b"one":
            await client.head()
        assert await client.chunk() == part
    call.end()
    assert await client.chunk() == b""
    assert not (await rig.done()).streamed


async def test_an_event_cut_anywhere_arrives_whole(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    call.stream()
    stream = (
        'data: {"text": "日本語"}\n\ndata: {"text": "ü"}\r\n\r\n: a comment\n\ndata: [DONE]\n\nrest'.encode()
    )
    for at in range(len(stream)):
        call.chunk(stream[at : at + 1])
        await call.writable()
        await asyncio.sleep(0)
    call.end()
    answer = await client.answer()
    assert (answer.body, answer.whole) == (stream, True)
    assert answer.chunks[-2:] == [b"data: [DONE]\n\n", b"rest"]


async def test_an_event_too_long_to_hold_passes_unfinished(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    call.stream()
    call.chunk(b"data: " + b"x" * 2_000_000)
    await client.head()
    assert len(await client.chunk()) > 1_000_000


async def test_the_head_is_held_until_there_is_output(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    call.stream()
    call.chunk(b"data: beg")
    head = asyncio.create_task(client.head())
    done, _ = await asyncio.wait([head], timeout=0.05)
    assert not done
    call.chunk(b"un\n\n")
    assert (await head).status == 200
    assert await client.chunk() == b"data: begun\n\n"


async def test_connections_are_kept_on_both_sides(rig: Rig) -> None:
    rig.engine.answer = lambda call: call.reply(200, call.body)
    client = await rig.client()
    for n in range(20):
        client.post(CHAT, b"%d" % n)
        assert (await client.answer()).body == b"%d" % n
    assert rig.engine.connections == 1


async def test_an_engine_that_closed_an_idle_connection_costs_nothing(rig: Rig) -> None:
    rig.engine.answer = lambda call: call.reply(200, call.body)
    client = await rig.client()
    client.post(CHAT, b"1")
    await client.answer()
    rig.engine.close_idle()
    client.post(CHAT, b"2")
    answer = await client.answer()
    assert (answer.status, answer.body) == (200, b"2")
    await rig.done()
    assert (await rig.done()).attempts == 1


async def test_requests_run_side_by_side(rig: Rig) -> None:
    clients = [await rig.client() for _ in range(30)]
    for n, client in enumerate(clients):
        client.post(CHAT, b"%d" % n)
    calls = [await rig.engine.call() for _ in clients]
    for call in reversed(calls):
        call.reply(200, b"for " + call.body)
    for n, client in enumerate(clients):
        assert (await client.answer()).body == b"for %d" % n


async def test_headers_pass_except_those_of_the_hop(rig: Rig) -> None:
    client = await rig.client()
    client.post(
        CHAT,
        headers={
            "X-Own": "kept", "Accept": "text/event-stream", "Connection": "keep-alive",
            "Keep-Alive": "timeout=5", "TE": "trailers", "Expect": "100-continue",
            "Proxy-Authorization": "x", "Authorization": "Bearer sk-secret",
            "X-Api-Key": "sk-secret", "Cookie": "session=secret",
        },
    )  # fmt: skip
    assert (await client.head()).status == 100  # at once, not with the answer
    call = await rig.engine.call()
    assert {name for name, _ in call.headers} == {
        b"accept", b"content-length", b"content-type", b"host", b"x-own", b"x-request-id"
    }  # fmt: skip
    assert call.header(b"x-own") == b"kept"
    call.reply(200, b"{}", [
        (b"X-Engine", b"kept"), (b"Connection", b"keep-alive"), (b"Keep-Alive", b"timeout=5"),
        (b"Server", b"uvicorn"), (b"Date", b"Thu, 01 Jan 1970 00:00:00 GMT"), (b"X-Request-Id", b"other"),
    ])  # fmt: skip
    answer = await client.answer()
    assert answer.headers.pop("date") != "Thu, 01 Jan 1970 00:00:00 GMT"
    uuid.UUID(answer.headers.pop("x-request-id"))
    assert answer.headers == {
        "content-length": "2", "content-type": "application/json", "x-engine": "kept",
        "x-citadel-model": "alpha", "x-citadel-generation": "1",
    }  # fmt: skip


async def test_headers_that_connection_names_stay_on_their_hop(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT, headers={"Connection": "keep-alive, X-Hop", "X-Hop": "1", "X-Own": "2"})
    call = await rig.engine.call()
    assert call.header(b"x-hop") is None
    assert call.header(b"x-own") == b"2"
    call.reply(200, b"{}")
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("sent", ["abc-123", "x" * 128, "with space and ~"])
async def test_the_clients_request_id_goes_all_the_way(rig: Rig, sent: str) -> None:
    client = await rig.client()
    client.post(CHAT, headers={"X-Request-Id": sent})
    call = await rig.engine.call()
    assert call.header(b"x-request-id") == sent.encode()
    call.reply(200, b"{}")
    assert (await client.answer()).headers["x-request-id"] == sent
    assert (await rig.done()).request_id == sent


@pytest.mark.parametrize("sent", ["x" * 129, "tab\tbed", "ünï", ""])
async def test_an_odd_request_id_is_replaced(rig: Rig, sent: str) -> None:
    client = await rig.client()
    client.post(CHAT, headers={"X-Request-Id": sent})
    call = await rig.engine.call()
    made = call.header(b"x-request-id")
    assert made is not None
    assert uuid.UUID(made.decode()).version == 4
    call.reply(200, b"{}")
    assert (await client.answer()).headers["x-request-id"] == made.decode()


async def test_one_record_a_request(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT, headers={"X-Request-Id": "r1"})
    call = await rig.engine.call()
    assert rig.gateway.active == 1
    assert len(rig.alpha.leases) == 1
    call.reply(422, b"no")
    assert (await client.answer()).status == 422
    record = await rig.done()
    assert (record.request_id, record.model, record.endpoint, record.status) == ("r1", "alpha", CHAT, 422)
    assert (record.generation, record.attempts, record.streamed) == (1, 1, False)
    assert record.first_byte_s is not None
    assert 0 < record.first_byte_s <= record.duration_s < SECONDS
    assert not rig.records
    assert rig.gateway.active == 0
    assert not rig.alpha.leases


async def test_a_client_that_does_not_read_stops_the_engine_not_the_gateway(rig: Rig) -> None:
    client = await rig.client(limit=1024)
    client.post(CHAT)
    call = await rig.engine.call()
    call.stream()
    event = b"data: " + b"x" * 65_000 + b"\n\n"
    sent = 0
    # Loopback's own buffers take a few megabytes; the gateway must not take what comes after.
    while sent < 200_000_000 and call.connection.flowing.is_set():
        call.chunk(event)
        sent += len(event)
        try:
            async with asyncio.timeout(0.5):
                await call.connection.flowing.wait()
        except TimeoutError:
            break
    assert sent < 30_000_000
    other = await rig.client()
    other.post(CHAT, b"other")
    second = await rig.engine.call()
    second.reply(200, b"served")
    assert (await other.answer()).body == b"served"
    received = 0
    await client.head()
    while received < sent:
        received += len(await client.chunk())
    call.end()
    assert await client.chunk() == b""
    assert received == sent


async def test_pipelined_requests_are_answered_in_order(rig: Rig) -> None:
    rig.engine.answer = lambda call: call.reply(200, call.body)
    client = await rig.client()
    for n in range(3):
        client.post(CHAT, b"%d" % n)
    assert [(await client.answer()).body for _ in range(3)] == [b"0", b"1", b"2"]


async def test_pipelined_requests_end_with_one_that_is_cut(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    client = await rig.client()
    for n in range(3):
        client.post(CHAT, b"%d" % n)
    (await rig.engine.call()).reply(200, b"first")
    assert (await client.answer()).body == b"first"
    call = await rig.engine.call()
    call.head(200, [(b"Content-Length", b"100")])
    call.chunk(b"some")
    call.die()
    answer = await client.answer()
    assert (answer.body, answer.whole) == (b"some", False)
    await rig.done()
    assert rig.engine.pending == 0
    assert not caplog.records


async def test_a_late_generation_is_waited_for_within_the_limit(make_rig: MakeRig) -> None:
    rig = await make_rig(restart_wait_s=0.05)
    await rig.alpha.lose()
    answer = await rig.post(CHAT)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "4"
    assert answer.json()["error"]["code"] == "model_not_ready"
    record = await rig.done()
    assert (record.status, record.attempts) == (503, 0)
    assert record.waited_s > 0.04  # timers may fire a little early
