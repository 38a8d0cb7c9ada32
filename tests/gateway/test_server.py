"""The server under the gateway: what is not a request, and how it stops."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from citadel_supervisor.config import Settings
from citadel_supervisor.gateway.asgi import respond
from citadel_supervisor.gateway.envelope import Guard
from citadel_supervisor.gateway.server import LARGEST_HEAD, MOST_HEADERS, DataServer
from citadel_supervisor.gateway.sockets import bind_all, port_number
from tests.fake_upstream import SECONDS
from tests.gateway.client import Client
from tests.gateway.conftest import MakeRig, Rig

CHAT = "/v1/chat/completions"


def one_model(tmp_path: Path) -> Settings:
    """Settings with one model and no fixed port."""
    models = {"alpha": {"port": 0, "checkpoint": "/x"}}
    gateway = {"router_port": 0, "metrics_port": 0, "health_port": 0}
    return Settings.model_validate({"state_dir": str(tmp_path), "gateway": gateway, "models": models})


@pytest.mark.parametrize(
    "garbage", [b"garbage\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"\x16\x03\x01\x02\x00"]
)
async def test_what_is_not_http_is_a_400_and_the_end(rig: Rig, garbage: bytes) -> None:
    client = await rig.client()
    client.send(garbage)
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.json()["error"]["code"] == "invalid_http"
    assert await client.closed() == b""


@pytest.mark.parametrize(
    "header",
    [
        b"X-A: 1\r\n 2",
        b"X-A: 1\n2",
        b"X-A: 1\r2",
        b"X-A: 1\x002",
        b"X A: 1",
        b"Content-Length: 5\r\nContent-Length: 6",
    ],
)
async def test_a_header_that_could_be_two_never_reaches_an_engine_as_such(rig: Rig, header: bytes) -> None:
    rig.engine.answer = lambda call: call.reply(
        200, b"|".join(name + b"=" + value for name, value in call.headers)
    )
    client = await rig.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n".encode() + header + b"\r\nContent-Length: 2\r\n\r\n{}")
    answer = await client.answer()
    assert answer.status == 400 or b"\n" not in answer.body, answer


async def test_headers_without_end_are_a_431(rig: Rig) -> None:
    client = await rig.client()
    client.send(b"GET /health HTTP/1.1\r\nX-Long: ")
    for _ in range(LARGEST_HEAD // 1000 + 1):
        client.send(b"x" * 1000)
    answer = await client.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (431, "headers_too_large")
    assert await client.closed() == b""


async def test_headers_too_large_at_once_are_a_431(rig: Rig) -> None:
    client = await rig.client()
    client.get("/health", headers={"X-Long": "x" * LARGEST_HEAD})
    assert (await client.answer()).status == 431


async def test_too_many_headers_are_a_431(rig: Rig) -> None:
    client = await rig.client()
    client.get("/health", headers={f"X-{n}": "1" for n in range(MOST_HEADERS)})
    assert (await client.answer()).status == 431


async def test_large_but_allowed_headers_pass_on_a_connection_in_use(rig: Rig) -> None:
    rig.engine.answer = lambda call: call.reply(200, b"{}")
    client = await rig.client()
    for _ in range(3):
        client.post(CHAT, bytes(100_000), headers={"X-Long": "x" * (LARGEST_HEAD - 1000)})
        assert (await client.answer()).status == 200


async def test_garbage_behind_a_request_does_not_get_into_its_answer(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    call.stream()
    call.chunk(b"data: 1\n\n")
    await client.head()
    assert await client.chunk() == b"data: 1\n\n"
    client.send(b"garbage\r\n\r\n")
    assert await client.closed() == b""
    await call.gone()


async def test_an_idle_connection_is_closed_after_a_while(make_rig: MakeRig) -> None:
    rig = await make_rig(keep_alive_s=1.0)
    client = await rig.client()
    client.get("/health")
    await client.answer()
    assert await client.closed() == b""


async def test_stopping_lets_an_answer_finish_and_closes_the_rest(rig: Rig) -> None:
    idle = await rig.client()
    idle.get("/health")
    await idle.answer()
    busy = await rig.client()
    busy.post(CHAT)
    call = await rig.engine.call()
    stopping = asyncio.create_task(rig.server.stop(SECONDS))
    assert await idle.closed() == b""
    with pytest.raises(ConnectionRefusedError):
        await rig.client()
    call.reply(200, b"finished")
    assert (await busy.answer()).body == b"finished"
    await stopping
    assert rig.server.connections == 0


async def test_stopping_waits_only_so_long(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    await rig.server.stop(0.01)
    await call.gone()
    assert await client.closed() == b""
    assert (await rig.done()).status == 499
    assert not caplog.records


async def test_connections_that_queued_before_the_start_are_served(tmp_path: Path) -> None:
    """The ports listen from the moment they are bound."""
    ports = bind_all(one_model(tmp_path))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 200, b"%d" % scope["server"][1])

    server = DataServer(app, ports, 60.0)
    socks = list(ports)
    early = [await Client.connect(port_number(sock)) for sock in socks for _ in range(20)]
    for client in early:
        client.get("/")
    await server.start()
    answers = [(await client.answer()).body for client in early]
    assert answers == [b"%d" % port_number(sock) for sock in socks for _ in range(20)]
    for client in early:
        await client.leave()
    await server.stop(SECONDS)


async def test_a_bug_in_the_middle_of_an_answer_cuts_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        if scope["path"] == "/some":
            await send({"type": "http.response.body", "body": b"some", "more_body": True})
        raise RuntimeError("a bug")

    ports = bind_all(one_model(tmp_path))
    server = DataServer(Guard(app), ports, 60.0)
    await server.start()
    for path, body in (("/some", b"some"), ("/none", b"")):
        client = await Client.connect(port_number(ports.router))
        client.get(path)
        answer = await client.answer()
        assert (answer.status, answer.body, answer.whole) == (200, body, False)
        await client.leave()
    await server.stop(SECONDS)
    assert not caplog.records  # uvicorn's own words on it would be a second report
