"""The daemon: the only place that wires its parts together.

In this order: the runtime directory is locked and cleared of what an earlier daemon left, every port
is bound, then the gateway answers (503 until a model is ready), the control socket opens, and only
then do workers start. SIGTERM takes it down the other way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import setproctitle
import uvloop
from loguru import logger

from citadel_supervisor import __version__
from citadel_supervisor.config import Settings
from citadel_supervisor.config_load import load_settings
from citadel_supervisor.control.peers import Gate
from citadel_supervisor.control.server import PATH_BYTES, ControlServer, bind_control_socket
from citadel_supervisor.errors import AlreadyRunning, CitadelError, ConfigError, DaemonExit, StartError
from citadel_supervisor.events import EventBus
from citadel_supervisor.gateway.ports import build_apps
from citadel_supervisor.gateway.server import DataServer
from citadel_supervisor.gateway.sockets import BoundPorts, bind_all, port_number
from citadel_supervisor.gateway.upstream import UpstreamPool
from citadel_supervisor.notify import Notifier
from citadel_supervisor.observe.exposition import Exposition
from citadel_supervisor.observe.logging import EngineLines, log_event, set_up_logging
from citadel_supervisor.observe.metrics import Metrics, Sources
from citadel_supervisor.placement import place
from citadel_supervisor.states import WorkerSnapshot, WorkerState
from citadel_supervisor.supervisor import Supervisor
from citadel_supervisor.topology import read_topology
from citadel_supervisor.workers.fleet import STOPPING, Fleet, worker_socket
from citadel_supervisor.workers.parentage import become_subreaper
from citadel_supervisor.workers.process import end_survivors

STATUS_EVERY_S = 5.0
MOST_GENERATIONS = 999_999
"""The number of digits that a socket's path must have room for."""
START_TIMEOUT_STEP_S = 120.0
"""While a worker is loading and moving, systemd is asked for this much more time."""


def run(settings: Settings, config_path: Path | None) -> int:
    """Run the daemon until it is told to stop; returns its exit code. Blocks.

    Raises StartError or ConfigError, before any worker exists, when it cannot start.
    """
    _check_paths(settings)
    setproctitle.setproctitle("citadel-supervisor")
    become_subreaper()
    with _locked(settings.runtime):
        set_up_logging(settings.log, settings.logs, list(settings.models))
        with contextlib.closing(bind_all(settings)) as ports:
            control = bind_control_socket(settings.socket, settings.control.group)
            return uvloop.run(_main(settings, config_path, ports, control))


def _check_paths(settings: Settings) -> None:
    """Raises StartError if an engine's socket would have a longer path than the kernel takes."""
    longest = worker_socket(settings.runtime, max(settings.models, key=len), MOST_GENERATIONS)
    if len(os.fsencode(longest)) > PATH_BYTES:
        raise StartError(f"{longest}: a socket's path has at most {PATH_BYTES} bytes; shorten runtime_dir")


@contextlib.contextmanager
def _locked(runtime: Path) -> Iterator[None]:
    """Hold the runtime directory, made if need be. Raises AlreadyRunning or StartError."""
    try:
        runtime.mkdir(parents=True, exist_ok=True, mode=0o755)
        lock = os.open(runtime / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StartError(f"cannot use the runtime directory {runtime}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise AlreadyRunning(str(runtime), holder) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    try:
        yield
    finally:
        os.close(lock)


async def _main(
    settings: Settings, config_path: Path | None, ports: BoundPorts, control: socket.socket
) -> int:
    survivors = await end_survivors(settings.runtime)
    if survivors:
        logger.warning("ended {} processes that an earlier supervisor left", len(survivors))
    for name in ("workers", "zygote"):
        await asyncio.to_thread(shutil.rmtree, settings.runtime / name, ignore_errors=True)
    return await _Daemon(settings, config_path, ports, control).run()


class _Daemon:
    def __init__(
        self, settings: Settings, config_path: Path | None, ports: BoundPorts, control: socket.socket
    ) -> None:
        self._settings = settings
        self._ports = _numbers(ports)
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._notifier = Notifier(os.environ)
        self._bus = EventBus(on_error=_consumer_failed)
        self._bus.subscribe(log_event)
        self._pool = UpstreamPool(max_idle=2)  # our own questions to engines, apart from clients'
        self._fleet = Fleet(
            settings,
            place(settings, read_topology()),
            self._bus,
            self._ask,
            self._forget,
            EngineLines().open,
        )
        metrics = Metrics(Sources(self._snapshots, lambda: self._fleet.memory))
        self._bus.subscribe(metrics.consume)
        exposition = Exposition(metrics, self._fleet.workers, self._ask)
        self._gateway, app = build_apps(
            settings, ports, self._fleet.workers, exposition.text, self._bus.publish
        )
        self._data = DataServer(app, ports, settings.gateway.keep_alive_s)
        self._supervisor = Supervisor(
            settings, config_path, self._fleet, self._bus, self._ports, load_settings
        )
        gate = Gate.for_group(settings.control.group)
        self._control = ControlServer(self._supervisor, control, gate=gate, publish=self._bus.publish)

    async def run(self) -> int:
        """Serve until told to stop; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as tasks:
                loop.add_signal_handler(signal.SIGHUP, lambda: tasks.create_task(self._reload()))
                await self._data.start()
                await self._control.start()
                logger.info("{}", self._banner())
                watchdog = tasks.create_task(self._notifier.feed_watchdog(), name="watchdog")
                fleet = tasks.create_task(self._fleet.run(), name="fleet")
                startup = tasks.create_task(self._announce(), name="announce")
                await self._stop.wait()
                startup.cancel()
                await self._shut_down()
                fleet.cancel()
                watchdog.cancel()
        finally:
            await self._control.stop()
            await self._data.stop(1.0)
            self._gateway.close()
            self._pool.close()
            self._notifier.close()
        logger.info("stopped")
        return DaemonExit.OK

    def _forget(self, address: str) -> None:
        self._pool.forget(address)
        self._gateway.forget(address)

    async def _ask(self, address: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """One whole HTTP exchange with an engine. Raises UpstreamError."""
        headers = [(b"content-type", b"application/json")]
        exchange = self._pool.send(address, method.encode(), path.encode(), headers, body)
        try:
            await exchange.start()
            parts = []
            while part := await exchange.read():
                parts.append(part)
            return exchange.status, b"".join(parts)
        finally:
            exchange.abort()

    def _banner(self) -> str:
        settings, numbers = self._settings, self._ports
        models = ", ".join(f"{name} {numbers[name]}" for name in settings.models)
        return " ".join(
            [
                *([settings.banner] if settings.banner else []),
                f"citadel-supervisor {__version__} on {settings.gateway.host}: {models}, "
                f"router {numbers['router']}; control socket {settings.socket}",
            ]
        )

    async def _announce(self) -> None:
        """Tell systemd and the log how start-up goes, and when it is over."""
        settled = asyncio.ensure_future(self._fleet.settled())
        while not settled.done():
            seen = self._snapshots()
            self._notifier.status("; ".join(f"{one.model} {one.state} {one.progress.text()}" for one in seen))
            if any(one.state is not WorkerState.BACKING_OFF for one in seen):
                self._notifier.extend(START_TIMEOUT_STEP_S)
            await asyncio.wait([settled], timeout=1.0)
        missing = [f"{one.model} is {one.state}" for one in self._snapshots() if not one.ready]
        took_s = time.monotonic() - self._began
        text = "; ".join([f"{self._count_ready()} after {took_s:.1f} s", *missing])
        logger.log("WARNING" if missing else "SUCCESS", "{}", text)
        self._notifier.ready()
        while True:
            self._notifier.status(self._count_ready())
            await asyncio.sleep(STATUS_EVERY_S)

    def _count_ready(self) -> str:
        seen = self._snapshots()
        return f"{sum(one.ready for one in seen)} of {len(seen)} models ready"

    def _snapshots(self) -> list[WorkerSnapshot]:
        return [worker.snapshot() for worker in self._fleet.workers.values()]

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            drain_s = self._settings.workers.drain_s
            logger.info("stopping: requests in flight may take {:g} s; a second signal ends them", drain_s)
            self._stop.set()
        else:
            logger.warning("stopping at once")
            self._hurry.set()

    async def _shut_down(self) -> None:
        """Readiness goes first, requests in flight finish within the bound, then the workers stop."""
        self._notifier.stopping()
        self._notifier.status("draining")
        self._supervisor.draining = True
        self._gateway.begin_drain()
        for worker in self._fleet.workers.values():
            if not worker.snapshot().ready:
                # Nothing is in flight there, and what waits for it would wait in vain.
                worker.stop(0, STOPPING)
        hurry = asyncio.ensure_future(self._hurry.wait())
        drained = asyncio.ensure_future(self._gateway.drained(self._settings.workers.drain_s))
        await asyncio.wait([hurry, drained], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        drained.cancel()
        self._notifier.status("stopping workers")
        await self._fleet.stop(0)

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            await self._supervisor.reload()
        except ConfigError as error:
            logger.error("the configuration was not reloaded, nothing was changed: {}", error)
        except CitadelError as error:
            logger.error("reload failed: {}", error)
        finally:
            self._notifier.ready()


def _consumer_failed(error: Exception) -> None:
    logger.opt(exception=error).error("a consumer of events failed")


def _numbers(ports: BoundPorts) -> dict[str, int]:
    """The bound port numbers, by "router", "metrics", "health" and model id."""
    own = {"router": ports.router, "metrics": ports.metrics, "health": ports.health}
    return {name: port_number(sock) for name, sock in (own | ports.models).items()}
