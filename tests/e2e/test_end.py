"""How the daemon ends: killed, told to stop, told twice, and told while it loads. Nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.conftest import processes_of
from tests.e2e.conftest import Measured
from tests.e2e.daemon import Daemon, demo_model, free_ports, write_config
from tests.e2e.load import load
from tests.e2e.traces import Traces, litter

pytestmark = [pytest.mark.timeout(300)]

MakeDaemon = Callable[..., Daemon]


@pytest.fixture(scope="module")
def pair(make_daemon: MakeDaemon) -> Daemon:
    """Two real engines on ports that stay the same. Not running at first; a test may leave it ended."""
    one, two, router, metrics, health = free_ports(5)

    def write(place: Path) -> Path:
        return write_config(
            place,
            {"one": demo_model(port=one), "two": demo_model(port=two)},
            gateway={"router_port": router, "metrics_port": metrics, "health_port": health},
        )

    return make_daemon(write)


@pytest.mark.engine
async def test_killed_under_load(pair: Daemon, measured: Measured) -> None:
    """No process, no file is left; a new daemon has the ports at once and cleans up."""
    before = litter()
    ports = _ports(status := await pair.ready())
    traces = Traces(pair, before)
    assert len(traces.alive()) == 6, "the daemon, the zygote and two processes for each model"
    assert len(processes_of(pair.runtime)) == 5, "all but the daemon carry its mark"
    async with load(ports["one"]) as requests:
        outcomes = [requests.stream("one", 1500), requests.plain("one", 1500)]
        await outcomes[0].output()
        pair.signal(signal.SIGKILL)
        took_s = await traces.gone()
        for outcome in outcomes:
            assert (await outcome.end()).error is not None
    measured.tell(
        f"daemon killed: its {len(status['models'])} workers and the zygote gone after {took_s:.2f} s"
    )
    assert await pair.exit_code() == -signal.SIGKILL
    assert traces.files() == []

    pair.start()
    began = time.monotonic()
    async with httpx.AsyncClient(timeout=30) as http:
        for port in ports.values():
            await _until_answered(http, port)
        measured.tell(f"a new daemon answers on all ports after {time.monotonic() - began:.2f} s")
        again = await pair.ready()
        measured.tell(f"and is ready after {time.monotonic() - began:.1f} s")
        assert _ports(again) == ports
        answer = await http.post(
            f"http://127.0.0.1:{ports['router']}/v1/completions", json={"prompt": "x", "max_tokens": 1}
        )
    assert answer.status_code == 200
    left = {path.name for path in (pair.runtime / "workers").iterdir()}
    assert left == {"one.1", "one.1.sock", "two.1", "two.1.sock"}, "and nothing of the killed one's"


@pytest.mark.engine
async def test_told_to_stop_under_load(pair: Daemon) -> None:
    """Readiness goes first, what runs is finished, what comes is refused, then it ends with code 0."""
    before = litter()
    ports = _ports(await pair.ready())
    traces = Traces(pair, before)
    async with load(ports["one"]) as requests, httpx.AsyncClient(timeout=30) as http:
        stream, plain = requests.stream("one", 60), requests.plain("one", 60)
        await stream.output()
        pair.signal(signal.SIGTERM)
        for port in (ports["health"], ports["router"], ports["one"]):
            health = await _until_status(http, f"http://127.0.0.1:{port}/health", 503)
            assert "retry-after" in health.headers
        refused = await http.post(f"http://127.0.0.1:{ports['two']}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "draining"
        assert not stream.ended, "all this while the stream was still running"
        for outcome in (stream, plain):
            await outcome.end()
            assert outcome.whole, outcome.error
    assert await pair.exit_code() == 0
    assert await traces.gone(1.0) < 1.0
    assert traces.files() == []
    assert _inside(pair.runtime) == []
    for port in ports.values():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


@pytest.mark.engine
@pytest.mark.parametrize("moment", ["zygote", "engine"])
async def test_told_to_stop_while_it_loads(pair: Daemon, moment: str, measured: Measured) -> None:
    before = litter()
    if pair.running():
        pair.signal(signal.SIGTERM)
        assert await pair.exit_code() == 0
    pair.start()
    if moment == "zygote":
        await pair.until(lambda status: status["zygote"]["pid"])
    else:
        await pair.until(lambda status: status["models"]["two"]["core_pid"])
    traces = Traces(pair, before)
    assert len(traces.alive()) >= (2 if moment == "zygote" else 5)
    pair.signal(signal.SIGTERM)
    began = time.monotonic()
    assert await pair.exit_code(20) == 0
    measured.tell(f"told to stop while the {moment} loads: ended after {time.monotonic() - began:.2f} s")
    assert await traces.gone(1.0) < 1.0
    assert traces.files() == []
    assert _inside(pair.runtime) == []


@pytest.fixture
def fake(make_daemon: MakeDaemon, fake_engine: Path) -> Daemon:
    """A daemon with one stand-in engine, which makes a token for each byte written to a FIFO."""

    def write(place: Path) -> Path:
        os.mkfifo(place / "tokens")
        (place / "checkpoint").mkdir()
        model = {
            "checkpoint": str(place / "checkpoint"),
            "python": str(fake_engine),
            "env": {"FAKE_TOKENS": str(place / "tokens"), "FAKE_FREE_TOKENS": "60"},
        }
        return write_config(place, {"alpha": model}, workers={"drain_s": 600})

    return make_daemon(write)


async def test_told_to_stop_twice(fake: Daemon, measured: Measured) -> None:
    """The second time it does not wait for what runs, which is told so."""
    before = litter()
    ports = _ports(await fake.ready())
    traces = Traces(fake, before)
    async with load(ports["alpha"]) as requests:
        stream = requests.stream("alpha", 100)
        await stream.output()
        fake.signal(signal.SIGTERM)
        async with httpx.AsyncClient(timeout=30) as http:
            await _until_status(http, f"http://127.0.0.1:{ports['health']}/health", 503)
        assert fake.running()
        assert not stream.ended
        fake.signal(signal.SIGTERM)
        began = time.monotonic()
        assert await fake.exit_code(15) == 0
        measured.tell(f"told twice to stop: ended after {time.monotonic() - began:.2f} s")
        assert (await stream.end()).error is not None
    assert await traces.gone(1.0) < 1.0
    assert traces.files() == []
    assert _inside(fake.runtime) == []


def _ports(status: dict) -> dict[str, int]:  # type: ignore[type-arg]
    return {**status["ports"], **{name: model["port"] for name, model in status["models"].items()}}


def _inside(runtime: Path) -> list[str]:
    """What is left in the runtime directory but its lock and empty directories."""
    return [
        str(path)
        for path in runtime.rglob("*")
        if not stat.S_ISDIR(path.lstat().st_mode) and path != runtime / "lock"
    ]


async def _until_answered(http: httpx.AsyncClient, port: int, seconds: float = 10.0) -> None:
    """Wait until something answers there; any status will do."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(httpx.TransportError):
                await http.get(f"http://127.0.0.1:{port}/health")
                return
            await asyncio.sleep(0.02)


async def _until_status(http: httpx.AsyncClient, url: str, status: int) -> httpx.Response:
    async with asyncio.timeout(10):
        while True:
            answer = await http.get(url)
            if answer.status_code == status:
                return answer
            await asyncio.sleep(0.02)
