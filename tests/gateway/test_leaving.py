"""A client that leaves cancels its request, in every phase: nothing goes on working for nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from citadel_supervisor.gateway.exchange import MOST_UNREAD
from tests.fake_upstream import SECONDS, Call, full_queue, until
from tests.gateway.client import Client
from tests.gateway.conftest import Rig

CHAT = "/v1/chat/completions"
HOWS = pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])


async def begun(rig: Rig, body: bytes = b"{}") -> tuple[Client, Call]:
    client = await rig.client()
    client.post(CHAT, body)
    return client, await rig.engine.call()


async def is_over(rig: Rig) -> None:
    """The one request is recorded as left, and nothing of it remains."""
    record = await rig.done()
    assert (record.status, record.model) == (499, "alpha")
    assert rig.gateway.active == 0
    assert not rig.alpha.leases
    assert not rig.records


@HOWS
async def test_while_it_waits_for_a_generation(rig: Rig, reset: bool) -> None:
    await rig.alpha.lose()
    client = await rig.client()
    client.post(CHAT)
    await asyncio.wait_for(rig.alpha.waiting.wait(), SECONDS)
    await client.leave(reset)
    await is_over(rig)
    assert rig.alpha.snapshot().waiting_requests == 0
    assert rig.engine.requests == 0


@HOWS
async def test_before_the_first_byte(rig: Rig, reset: bool) -> None:
    client, call = await begun(rig)
    await client.leave(reset)
    await call.gone()
    await is_over(rig)


@HOWS
async def test_after_the_engine_sent_its_head(rig: Rig, reset: bool) -> None:
    client, call = await begun(rig)
    call.stream()
    await client.leave(reset)
    await call.gone()
    await is_over(rig)


@HOWS
async def test_in_the_middle_of_a_stream(rig: Rig, reset: bool) -> None:
    client, call = await begun(rig)
    call.stream()
    call.chunk(b"data: 1\n\n")
    await client.head()
    await client.chunk()
    await client.leave(reset)
    await call.gone()
    await is_over(rig)


@HOWS
async def test_in_the_middle_of_an_answer(rig: Rig, reset: bool) -> None:
    client, call = await begun(rig)
    call.head(200, [(b"Content-Length", b"100")])
    call.chunk(b"some")
    await client.head()
    await client.leave(reset)
    await call.gone()
    await is_over(rig)


@HOWS
async def test_after_a_large_body(rig: Rig, reset: bool) -> None:
    """Reading pauses while a large body waits to be taken; it must go on, or the end is not seen."""
    client, call = await begun(rig, bytes(3_000_000))
    await client.leave(reset)
    await call.gone()
    await is_over(rig)


@HOWS
async def test_while_its_answer_waits_for_it_to_read(rig: Rig, reset: bool) -> None:
    client, call = await begun(rig)
    call.stream()
    event = b"data: " + b"x" * 60_000 + b"\n\n"
    for _ in range(400):
        call.chunk(event)
    await client.head()
    await client.leave(reset)
    await call.gone()
    await is_over(rig)


async def test_while_it_waits_to_be_replayed(rig: Rig) -> None:
    client, call = await begun(rig)
    call.die()
    await rig.alpha.lose()
    await asyncio.wait_for(rig.alpha.waiting.wait(), SECONDS)
    await client.leave()
    await is_over(rig)


async def test_while_an_error_is_looked_into(rig: Rig) -> None:
    client, call = await begun(rig)
    call.reply(500, b"{}")
    await until(lambda: rig.alpha.doubted)
    await client.leave()
    await is_over(rig)


async def test_while_it_connects_to_the_engine(rig: Rig, tmp_path: Path) -> None:
    path = str(tmp_path / "full.sock")
    with full_queue(path):
        await rig.alpha.up(path)
        client = await rig.client()
        client.post(CHAT)
        await until(lambda: bool(rig.alpha.leases))
        await client.leave()
        await is_over(rig)


@HOWS
async def test_while_it_sends_its_body(rig: Rig, reset: bool) -> None:
    client = await rig.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf".encode())
    await until(lambda: rig.gateway.active == 1)
    await client.leave(reset)
    await is_over(rig)
    assert rig.engine.requests == 0


async def test_at_the_router_before_a_model_is_known(rig: Rig) -> None:
    client = await rig.client("router")
    client.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode())
    await until(lambda: rig.gateway.active == 1)
    await client.leave()
    record = await rig.done()
    assert (record.status, record.model, record.attempts) == (499, "", 0)


async def test_with_another_request_behind_it(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT, b"1")
    client.post(CHAT, b"2")
    call = await rig.engine.call()
    await client.leave()
    await call.gone()
    assert (await rig.done()).status == 499
    assert rig.engine.requests == 1


async def test_others_go_on(rig: Rig) -> None:
    leaver, left = await begun(rig)
    stayer, call = await begun(rig)
    await leaver.leave()
    await left.gone()
    call.reply(200, b"still here")
    assert (await stayer.answer()).body == b"still here"


async def test_nothing_is_logged_as_an_error(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    client, call = await begun(rig)
    call.stream()
    call.chunk(b"data: 1\n\n")
    await client.head()
    await client.leave(reset=True)
    await call.gone()
    await is_over(rig)
    assert not caplog.records


async def test_leaving_after_the_answer_is_no_leaving(rig: Rig) -> None:
    client, call = await begun(rig)
    call.reply(200, b"x" * MOST_UNREAD)
    await client.answer()
    await client.leave()
    assert (await rig.done()).status == 200
