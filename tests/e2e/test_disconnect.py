"""A client that leaves ends its generation in the engine, whatever the engine is doing for it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx
import pytest

from tests.e2e.conftest import Measured
from tests.e2e.daemon import PATIENCE_S, Daemon

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MODEL = "phi-3-mini"
"""The one that two requests fill, and whose prefill is many steps."""
BOUND_S = 2.0
"""Later 0.25. Here other engines, and other programs, may use the same cores."""
GAUGES = re.compile(r"^vllm:num_requests_(running|waiting)\{[^}]*\} (\S+)", re.MULTILINE)
PROMPT_TOKENS = re.compile(r"^vllm:prompt_tokens_total\{[^}]*\} (\S+)", re.MULTILINE)

Way = Literal["FIN", "RST"]
WAYS = pytest.mark.parametrize("way", ["FIN", "RST"])


class Engine:
    """What the model's port says of its engine."""

    def __init__(self, port: int, http: httpx.AsyncClient) -> None:
        self.port = port
        self._http = http

    async def counts(self) -> tuple[int, int]:
        """Requests running and waiting in the engine."""
        found = dict(GAUGES.findall((await self._http.get("/metrics")).text))
        return int(float(found["running"])), int(float(found["waiting"]))

    async def until(self, running: int, waiting: int, seconds: float = PATIENCE_S) -> float:
        """Wait for these counts; the seconds it took."""
        began = time.monotonic()
        while (counts := await self.counts()) != (running, waiting):
            assert time.monotonic() - began < seconds, f"still {counts} after {seconds:g} s"
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    async def prompt_tokens(self) -> int:
        """Tokens of prompts computed by this generation."""
        counted = PROMPT_TOKENS.findall((await self._http.get("/metrics")).text)
        return int(sum(map(float, counted)))


class Client:
    """A bare client, which can leave in either way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def send(self, **fields: Any) -> None:
        body = json.dumps({"model": MODEL, "ignore_eos": True, "temperature": 0, **fields}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self._writer.drain()

    async def first_event(self) -> None:
        await asyncio.wait_for(self.reader.readuntil(b"data: "), PATIENCE_S)

    def leave(self, way: Way) -> None:
        """Close the connection: with a reset, or orderly."""
        if way == "RST":
            raw: socket.socket = self._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        else:
            self._writer.close()


@asynccontextmanager
async def connected(engine: Engine) -> AsyncIterator[Callable[[], Any]]:
    """Makes clients; those that have not left do so at the end."""
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_connection("127.0.0.1", engine.port)))
        return clients[-1]

    yield connect
    for client in clients:
        client.leave("FIN")


@pytest.fixture
async def engine(demo: Daemon) -> AsyncIterator[Engine]:
    """An idle engine, which is idle again at the end."""
    status = await demo.ready()
    port = status["models"][MODEL]["port"]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        engine = Engine(port, http)
        await engine.until(0, 0, 30)
        yield engine
        await engine.until(0, 0, 30)


@pytest.fixture
async def connect(engine: Engine) -> AsyncIterator[Callable[[], Any]]:
    async with connected(engine) as connect:
        yield connect


@WAYS
async def test_mid_stream(engine: Engine, connect: Callable[[], Any], way: Way, measured: Measured) -> None:
    client = await connect()
    await client.send(prompt="Once upon a time", max_tokens=1500, stream=True)
    await client.first_event()
    await engine.until(1, 0)
    client.leave(way)
    measured.left("mid-stream", way, await engine.until(0, 0, BOUND_S))


@WAYS
async def test_not_streaming(
    engine: Engine, connect: Callable[[], Any], way: Way, measured: Measured
) -> None:
    client = await connect()
    await client.send(prompt="Once upon a time", max_tokens=1500)
    await engine.until(1, 0)
    client.leave(way)
    measured.left("while it waited for a whole answer", way, await engine.until(0, 0, BOUND_S))


@WAYS
async def test_before_the_first_token(
    engine: Engine, connect: Callable[[], Any], way: Way, measured: Measured
) -> None:
    """While the prompt is computed; the engine can stop between two steps of it."""
    begun = await engine.prompt_tokens()
    client = await connect()
    first = 300 if way == "FIN" else 400  # two prompts that share no beginning, which would be cached
    prompt = [first + number for number in range(1900)]
    await client.send(prompt=prompt, max_tokens=1, stream=True)
    await engine.until(1, 0)
    client.leave(way)
    measured.left("before the first token", way, await engine.until(0, 0, BOUND_S))
    assert await engine.prompt_tokens() - begun < len(prompt), "the prompt was computed to its end"


@WAYS
async def test_queued_behind_a_full_engine(
    engine: Engine, connect: Callable[[], Any], way: Way, measured: Measured
) -> None:
    running = [await connect(), await connect()]
    for client in running:
        await client.send(prompt="Once upon a time", max_tokens=1500, stream=True)
        await client.first_event()
    queued = await connect()
    await queued.send(prompt="Once upon a time", max_tokens=1500)
    await engine.until(2, 1)
    queued.leave(way)
    measured.left("in the engine's queue", way, await engine.until(2, 0, BOUND_S))
    for client in running:
        client.leave(way)
    measured.left("with another, both mid-stream", way, await engine.until(0, 0, BOUND_S))


async def test_parked_while_the_worker_restarts(
    demo: Daemon, engine: Engine, connect: Callable[[], Any], measured: Measured
) -> None:
    """The new generation never sees the requests of those who left while it was loading."""
    assert (await demo.ctl("restart", "--no-wait", MODEL)).code == 0
    await demo.until(lambda status: status["models"][MODEL]["state"] != "ready")
    clients: dict[Way, Client] = {"FIN": await connect(), "RST": await connect()}
    for client in clients.values():
        await client.send(prompt=[300 + number for number in range(1000)], max_tokens=1500)
    await demo.until(lambda status: status["models"][MODEL]["waiting_requests"] == 2)
    left = 2
    for way, client in clients.items():
        left -= 1
        began = time.monotonic()
        client.leave(way)
        await demo.until(lambda status: status["models"][MODEL]["waiting_requests"] == left, BOUND_S)  # noqa: B023
        measured.left("while it was parked", way, time.monotonic() - began)
    status = await demo.ready()
    assert status["models"][MODEL]["active_requests"] == 0
    assert await engine.counts() == (0, 0)
    assert await engine.prompt_tokens() < 500, "only the known answer was computed"
