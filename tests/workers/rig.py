"""A fleet of fake engines in this process, made by the real spawn path, and what tests look at it with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import UpstreamLost, UpstreamRefused
from citadel_supervisor.events import Event, EventBus, Transition, WorkerExited
from citadel_supervisor.placement import place
from citadel_supervisor.states import WorkerSnapshot, WorkerState
from citadel_supervisor.topology import read_topology
from citadel_supervisor.workers.fleet import Fleet
from citadel_supervisor.workers.process import process_table
from citadel_supervisor.workers.worker import Worker

SECONDS = 15.0
"""How long a test waits for anything before it fails."""

QUICK_BACKOFF = {"initial_s": 0.02, "jitter": 0, "restarts": 5}


class EventLog:
    """Every event, and waiting for one."""

    def __init__(self, bus: EventBus) -> None:
        self.events: list[Event] = []
        self._came = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        bus.subscribe(self._take)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._came:
            self._came.notify_all()

    def moves(self, model: str = "alpha") -> list[Transition]:
        """The transitions of one model."""
        return [e for e in self.events if isinstance(e, Transition) and e.model == model]

    def states(self, model: str = "alpha", generation: int | None = None) -> list[WorkerState]:
        """The states it has moved to, of one generation or of all."""
        return [m.after for m in self.moves(model) if generation in (None, m.generation)]

    def exits(self, model: str = "alpha") -> list[WorkerExited]:
        return [e for e in self.events if isinstance(e, WorkerExited) and e.model == model]

    async def until(self, wanted: Callable[[], object]) -> None:
        """Return once `wanted()` is true; it is asked after each event."""
        try:
            async with asyncio.timeout(SECONDS), self._came:
                await self._came.wait_for(wanted)
        except TimeoutError:
            lines = "\n".join(map(str, self.events))
            raise AssertionError(f"it has not come within {SECONDS:g} s; what came is\n{lines}") from None

    async def move(
        self, after: WorkerState, model: str = "alpha", generation: int | None = None
    ) -> Transition:
        """The first transition to `after`, past or to come."""

        def found() -> list[Transition]:
            return [m for m in self.moves(model) if m.after is after and generation in (None, m.generation)]

        await self.until(found)
        return found()[0]


class Rig:
    """A running fleet. Its first model is "alpha"."""

    def __init__(self, settings: Settings, fleet: Fleet, bus: EventBus) -> None:
        self.settings = settings
        self.fleet = fleet
        self.bus = bus
        self.log = EventLog(bus)
        self.forgotten: list[str] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def alpha(self) -> Worker:
        return self.fleet.workers["alpha"]

    async def run(self) -> None:
        self._task = asyncio.create_task(self.fleet.run())
        # The fleet's task has to run once before the workers know what is wanted of them.
        await asyncio.sleep(0)

    async def close(self) -> None:
        """End the fleet as a daemon that ends would: everything still there is killed."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def crashed(self) -> bool:
        """Whether the fleet itself has ended."""
        return self._task is not None and self._task.done()

    async def settled(self, model: str = "alpha") -> WorkerSnapshot:
        async with asyncio.timeout(SECONDS):
            return await self.fleet.workers[model].settled()

    async def ready(self, model: str = "alpha") -> WorkerSnapshot:
        """Once settled, it must be ready."""
        seen = await self.settled(model)
        assert seen.state is WorkerState.READY, seen
        return seen

    async def ready_again(self, generation: int, model: str = "alpha") -> WorkerSnapshot:
        """Wait for that generation to be ready."""
        await self.log.move(WorkerState.READY, model, generation)
        return self.fleet.workers[model].snapshot()

    async def state(self, model: str = "alpha", **at_least: int) -> dict[str, int]:
        """The fake engine's counters, once one of them has reached a value."""
        generation = self.fleet.workers[model].generation
        assert generation is not None
        query = "&".join(f"{name}={value}" for name, value in at_least.items())
        path = f"/fake/wait?{query}" if query else "/fake/state"
        async with asyncio.timeout(SECONDS):
            status, body = await ask(generation.spec.socket, "GET", path, b"")
        assert status == 200
        counters: dict[str, int] = json.loads(body)
        return counters


def make_rig(run_dir: Path, models: dict[str, dict[str, Any]], **workers: Any) -> Rig:
    """A fleet that is not running yet. `models` are settings by id; `workers` is the section."""
    checkpoint = run_dir / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    defaults = {"port": 0, "checkpoint": str(checkpoint)}
    workers = {"oversubscribe": True, "drain_s": 5, "backoff": QUICK_BACKOFF} | workers
    settings = Settings.model_validate(
        {
            "models": {name: defaults | model for name, model in models.items()},
            "state_dir": run_dir / "state",
            "runtime_dir": run_dir,
            "workers": workers,
        }
    )

    async def open_output(name: str) -> int:
        return os.open(run_dir / f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    forgotten: list[str] = []
    bus = EventBus(on_error=_fail)
    fleet = Fleet(settings, place(settings, read_topology()), bus, ask, forgotten.append, open_output)
    rig = Rig(settings, fleet, bus)
    rig.forgotten = forgotten
    return rig


def _fail(error: Exception) -> None:
    raise error


async def ask(address: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """One exchange with the engine at a unix socket, failing as the gateway's client does."""
    try:
        reader, writer = await asyncio.open_unix_connection(address, limit=2**24)
    except OSError as error:
        raise UpstreamRefused(str(error)) from error
    try:
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if length:
            data = await reader.readexactly(int(length))
        else:
            data = await reader.readuntil(b"\r\n0\r\n\r\n")
        return int(answer.split(b" ")[1]), data
    except (OSError, asyncio.IncompleteReadError) as error:
        raise UpstreamLost(str(error)) from error
    finally:
        writer.close()


async def complete(address: str, **body: Any) -> tuple[int, bytes]:
    """A completion asked of an engine directly."""
    request = {"prompt": "The capital of France", "max_tokens": 7} | body
    return await ask(address, "POST", "/v1/completions", json.dumps(request).encode())


async def ended(pid: int) -> None:
    """Return once the process has ended, or is gone."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(watch, over.set)
    try:
        async with asyncio.timeout(SECONDS):
            await over.wait()
    finally:
        loop.remove_reader(watch)
        os.close(watch)


def session_of(leader: int) -> list[int]:
    """What is left of a session, zombies included."""
    return [entry.pid for entry in process_table().values() if entry.session == leader]


def zombies() -> list[int]:
    """Children of this process that nobody has reaped."""
    return [e.pid for e in process_table().values() if e.state == "Z" and e.ppid == os.getpid()]
