"""A gateway in front of fake engines, served by the real server on loopback, on the loop the daemon uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from citadel_supervisor.config import Settings
from citadel_supervisor.events import RequestDone
from citadel_supervisor.gateway.ports import Gateway, build_apps
from citadel_supervisor.gateway.server import DataServer
from citadel_supervisor.gateway.sockets import BoundPorts, bind_all, port_number
from tests.fake_upstream import SECONDS, FakeUpstream
from tests.gateway.backends import FakeBackend
from tests.gateway.client import Answer, Client

MODELS = ("alpha", "beta")


def pytest_asyncio_loop_factories(config: object, item: object) -> Mapping[str, Callable[[], Any]]:
    return {"uvloop": uvloop.new_event_loop}


@dataclass
class Rig:
    """A running gateway. `alpha` and `beta` are ready, each with an engine of the same name."""

    settings: Settings
    gateway: Gateway
    server: DataServer
    ports: BoundPorts
    backends: dict[str, FakeBackend]
    engines: dict[str, FakeUpstream]
    records: list[RequestDone]
    record: asyncio.Event
    stack: AsyncExitStack
    clients: list[Client] = field(default_factory=list)

    @property
    def alpha(self) -> FakeBackend:
        return self.backends["alpha"]

    @property
    def engine(self) -> FakeUpstream:
        """The engine of alpha."""
        return self.engines["alpha"]

    async def next_generation(self) -> FakeUpstream:
        """A new generation of alpha is ready: its engine, on an address of its own."""
        path = f"{self.engine.path}.{self.alpha.snapshot().generation + 1}"
        engine = await self.stack.enter_async_context(FakeUpstream(path))
        await self.alpha.up(path)
        return engine

    def __post_init__(self) -> None:
        ports = self.ports
        socks = {"router": ports.router, "metrics": ports.metrics, "health": ports.health, **ports.models}
        self.numbers = {purpose: port_number(sock) for purpose, sock in socks.items()}

    async def client(self, purpose: str = "alpha", limit: int = 2**16) -> Client:
        """A connection to a port."""
        client = await Client.connect(self.numbers[purpose], limit)
        self.clients.append(client)
        return client

    async def get(self, path: str, purpose: str = "alpha", method: str = "GET") -> Answer:
        """One request on a connection of its own."""
        client = await self.client(purpose)
        client.get(path, method)
        return await client.answer()

    async def post(
        self, path: str, body: bytes = b"{}", purpose: str = "alpha", headers: dict[str, str] | None = None
    ) -> Answer:
        client = await self.client(purpose)
        client.post(path, body, headers)
        return await client.answer()

    async def done(self) -> RequestDone:
        """The record of the next request that ends, or ended and was not asked for."""
        async with asyncio.timeout(SECONDS):
            while not self.records:
                self.record.clear()
                await self.record.wait()
        return self.records.pop(0)


MakeRig = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def make_rig(tmp_path: Path) -> AsyncIterator[MakeRig]:
    """`make_rig(**gateway)`: a rig with those settings of the gateway."""
    async with AsyncExitStack() as stack:

        async def make(**gateway: Any) -> Rig:
            own = {"router_port": 0, "metrics_port": 0, "health_port": 0, **gateway}
            models = {
                name: {
                    "port": 0,
                    "checkpoint": f"/models/{name}",
                    "aliases": [f"{name}-alias"],
                    "max_model_len": 4096,
                }
                for name in MODELS
            }
            settings = Settings.model_validate({"state_dir": str(tmp_path), "gateway": own, "models": models})
            ports = bind_all(settings)
            stack.callback(ports.close)
            backends = {name: FakeBackend(name) for name in MODELS}
            engines = {}
            for name in MODELS:
                path = str(tmp_path / f"{name}.sock")
                engines[name] = await stack.enter_async_context(FakeUpstream(path))
                await backends[name].up(path)
            records: list[RequestDone] = []
            record = asyncio.Event()

            def publish(event: RequestDone) -> None:
                records.append(event)
                record.set()

            async def metrics(model: str | None) -> bytes:
                return f"# of {model}\n".encode()

            gateway_, app = build_apps(settings, ports, backends, metrics, publish)
            stack.callback(gateway_.close)
            server = DataServer(app, ports, settings.gateway.keep_alive_s)
            await server.start()
            stack.push_async_callback(server.stop, 0.0)
            rig = Rig(settings, gateway_, server, ports, backends, engines, records, record, stack)

            async def leave() -> None:
                for client in rig.clients:
                    await client.leave()

            stack.push_async_callback(leave)
            return rig

        yield make


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    return await make_rig()
