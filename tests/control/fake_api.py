"""A small supervisor without workers, and a thread that serves it: what the control tests talk to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from citadel_supervisor.control.peers import Gate
from citadel_supervisor.control.server import ControlServer, bind_control_socket
from citadel_supervisor.errors import CitadelError, UnknownModel
from citadel_supervisor.events import Audit, EventBus, as_dict

ResultT = TypeVar("ResultT")

SINCE = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)


def fake_model(model: str, port: int, **changes: Any) -> dict[str, Any]:
    """One model's part of the status, ready unless told otherwise."""
    return {
        "id": model,
        "state": "ready",
        "reason": "",
        "port": port,
        "pid": 4_194_300,
        "core_pid": 4_194_301,
        "generation": 1,
        "restarts": 0,
        "last_loss": "",
        "cpus": [0, 1, 2, 3],
        "memory_bytes": 1_600_000_000,
        "active_requests": 2,
        "waiting_requests": 0,
        "since": SINCE.isoformat(),
        "progress": "",
        "launch": "zygote",
        "checkpoint": "/opt/models/" + model,
        "ready_after_s": 4.2,
    } | changes


def fake_status(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "uptime_s": 11_000.0,
        "pid": 4321,
        "ready": True,
        "draining": False,
        "memory_bytes": 61_000_000,
        "ports": {"router": 8000, "metrics": 9090, "health": 8080},
        "zygote": {"state": "ready", "pid": 4322, "preload_s": 3.1},
        "config": "/etc/citadel/citadel.yaml",
        "models": models,
    }


class FakeSupervisor:
    """Implements SupervisorApi over a dictionary.

    A command moves its model to a passing state at once, and to its last one when `settle` is set, as it
    is from the beginning. `refusals` are raised by the command of that name, `ends_in` replaces the last
    state.
    """

    def __init__(self, logs: Path) -> None:
        self.bus = EventBus()
        self.models = {
            "mixtral-8x7b": fake_model("mixtral-8x7b", 11400),
            "phi-3-mini": fake_model("phi-3-mini", 11403),
        }
        self.calls: list[tuple[Any, ...]] = []
        self.refusals: dict[str, Exception] = {}
        self.ends_in: dict[str, str] = {}
        self.settle = asyncio.Event()
        self.settle.set()
        self.called = asyncio.Event()
        self._logs = logs
        self._settling: set[asyncio.Task[None]] = set()

    @property
    def audits(self) -> list[Audit]:
        return [event for event in self.bus.recent() if isinstance(event, Audit)]

    def status(self) -> dict[str, Any]:
        return fake_status(self.models)

    async def start(self, model: str, wait: bool) -> dict[str, Any]:
        return await self._command("start", model, wait, ("loading", "ready"))

    async def stop(self, model: str, wait: bool, drain_s: float | None) -> dict[str, Any]:
        return await self._command("stop", model, wait, ("stopping", "stopped"), drain_s)

    async def restart(self, model: str, wait: bool, drain_s: float | None) -> dict[str, Any]:
        return await self._command("restart", model, wait, ("loading", "ready"), drain_s)

    async def drain(self, model: str, wait: bool) -> dict[str, Any]:
        return await self._command("drain", model, wait, ("draining", "draining"))

    async def _command(
        self, action: str, model: str, wait: bool, states: tuple[str, str], *more: object
    ) -> dict[str, Any]:
        self._known(model, list(self.models))
        if action in self.refusals:
            raise self.refusals[action]
        self.calls.append((action, model, wait, *more))
        self.called.set()
        self.models[model] |= {"state": states[0], "progress": "weights 45 % (120 of 269 MB)"}

        async def settle() -> None:
            await self.settle.wait()
            state = self.ends_in.get(model, states[1])
            reason = "checkpoint is damaged" if state == "quarantined" else ""
            self.models[model] |= {"state": state, "progress": "", "reason": reason}

        settling = asyncio.create_task(settle())
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        if wait:
            await asyncio.shield(settling)
        return self.models[model]

    async def reload(self) -> dict[str, Any]:
        self.calls.append(("reload",))
        self.called.set()
        await self.settle.wait()
        if "reload" in self.refusals:
            raise self.refusals["reload"]
        return {"changed": ["phi-3-mini"], "unchanged": ["mixtral-8x7b"], "restart_needed": ["gateway"]}

    def recent_events(self) -> list[dict[str, Any]]:
        return [as_dict(event) for event in self.bus.recent()]

    async def follow_events(self) -> AsyncIterator[dict[str, Any]]:
        async for event in self.bus.follow():
            yield as_dict(event)

    def log_path(self, model: str) -> Path:
        names = [*self.models, "supervisor", "zygote"]
        self._known(model, names)
        return self._logs / f"{model}.log"

    @staticmethod
    def _known(model: str, names: list[str]) -> None:
        if model not in names:
            raise UnknownModel(model, names)


class Hosted:
    """A fake supervisor served from a thread of its own, for tests of blocking clients."""

    def __init__(self, api: FakeSupervisor, socket: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.api = api
        self.socket = socket
        self._loop = loop
        self.closing = asyncio.Event()

    def do(self, action: Callable[[], ResultT]) -> ResultT:
        """Run `action` in the server's loop; blocks until it has."""

        async def act() -> ResultT:
            return action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result()

    def wait_called(self) -> None:
        """Block until the next command has arrived, and be ready to wait for another."""
        asyncio.run_coroutine_threadsafe(self._called(), self._loop).result(30)

    async def _called(self) -> None:
        await self.api.called.wait()
        self.api.called.clear()

    def stop(self) -> None:
        """Stop the server; returns without waiting for it."""
        self._loop.call_soon_threadsafe(self.closing.set)


@contextmanager
def hosted(directory: Path, group: str | None = None) -> Iterator[Hosted]:
    """A control server with a FakeSupervisor on `directory`/control.sock, in a thread."""
    ready: list[Hosted] = []
    failed: list[BaseException] = []
    up = threading.Event()

    async def serve() -> None:
        api = FakeSupervisor(directory)
        socket = directory / "control.sock"
        server = ControlServer(
            api,
            bind_control_socket(socket, group),
            gate=Gate.for_group(group),
            publish=api.bus.publish,
            log_poll_s=0.01,
            grace_s=1,
        )
        await server.start()
        host = Hosted(api, socket, asyncio.get_running_loop())
        ready.append(host)
        up.set()
        await host.closing.wait()
        await server.stop()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run, name="control server")
    thread.start()
    up.wait(30)
    try:
        if not ready:
            raise failed[0] if failed else CitadelError("the control server did not start")
        yield ready[0]
    finally:
        if ready and thread.is_alive():
            ready[0].stop()
        thread.join(30)
    if failed:
        raise failed[0]
