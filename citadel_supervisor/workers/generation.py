"""One generation of a worker: its processes from launch to the last of them gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from citadel_supervisor.config import ModelSettings
from citadel_supervisor.errors import LaunchError
from citadel_supervisor.workers.launch import Core, Hello, LaunchSpec, Report, decode_report
from citadel_supervisor.workers.lines import OpenOutput, read_lines
from citadel_supervisor.workers.process import Orphans, ProcessWatch, end_tree
from citadel_supervisor.workers.spawn import spawn_worker
from citadel_supervisor.workers.zygote import Zygote


@dataclass(frozen=True, slots=True)
class Reported:
    """A process of the generation wrote a line on the status pipe."""

    generation: int
    report: Report


@dataclass(frozen=True, slots=True)
class Exited:
    """A process of the generation ended; `part` is "API" or "engine core"."""

    generation: int
    part: str
    pid: int
    status: int


@dataclass(frozen=True, slots=True)
class Emptied:
    """Every process that held the status pipe is gone."""

    generation: int


Occurrence = Reported | Exited | Emptied

HELLO_WITHIN_S = 15.0
"""A fork of the zygote takes 30 ms, forks wait for each other; one silent for so long never will speak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What making processes needs; one for the whole fleet."""

    zygote: Zygote | None
    orphans: Orphans
    environment: Callable[[LaunchSpec, ModelSettings], Mapping[str, str]]
    """The environment of a spawned worker."""
    open_output: OpenOutput


class Generation:
    """The processes of one generation. All methods belong to the event loop's thread."""

    def __init__(self, spec: LaunchSpec, workshop: Workshop, post: Callable[[Occurrence], None]) -> None:
        self.spec = spec
        self.launch = ""
        """"zygote" or "spawn" once its process was asked for."""
        self.pid: int | None = None
        self.core_pid: int | None = None
        self._workshop = workshop
        self._post = post
        self._watches: dict[str, ProcessWatch] = {}
        self._forking = False
        self._over = False
        self._known = asyncio.Event()
        self._api_gone = asyncio.Event()

    async def start(self, model: ModelSettings) -> None:
        """Make the API process; it reports from then on. Raises LaunchError."""
        os.makedirs(os.path.dirname(self.spec.socket), mode=0o700, exist_ok=True)
        os.makedirs(self.spec.scratch, mode=0o700, exist_ok=True)
        zygote = None if model.spawns else self._workshop.zygote
        asked = 0
        status_read, status = os.pipe()
        output = -1
        try:
            output = await self._workshop.open_output(self.spec.model)
            reading, status_read = status_read, -1  # the reader's from here on, even if this is cancelled
            await read_lines(reading, self._on_line, self._on_empty)
            if zygote is None:
                environment = self._workshop.environment(self.spec, model)
                pid = spawn_worker(self.spec, environment, status=status, output=output, python=model.python)
                self._watch("API", pid)
                self.launch = "spawn"
            else:
                asked = await zygote.launch(self.spec, status, output)
                self.launch = "zygote"
                self._forking = True
                self._workshop.orphans.starting += 1
        finally:
            for descriptor in (status_read, status, output):
                if descriptor >= 0:
                    os.close(descriptor)
        if zygote is not None:
            await self._forked(zygote, asked)

    async def _forked(self, zygote: Zygote, asked: int) -> None:
        """Wait for the fork to say who it is; a zygote that cannot fork is replaced."""
        try:
            await asyncio.wait_for(self._known.wait(), HELLO_WITHIN_S)
        except TimeoutError:
            self._fork_is_over()
            zygote.replace(asked)
            raise LaunchError(
                f"the zygote has not forked within {HELLO_WITHIN_S:g} s; it is replaced"
            ) from None

    def alive(self) -> bool:
        """Whether the processes known so far all live, asked of the kernel now."""
        return bool(self._watches) and all(watch.alive() for watch in self._watches.values())

    def pids(self) -> list[int]:
        """The API process and, once it has said so, the engine core."""
        return [pid for pid in (self.pid, self.core_pid) if pid is not None]

    async def end(self, grace_s: float) -> bool:
        """SIGTERM, `grace_s` seconds, SIGKILL of the whole tree; True once no process is left.

        With a grace of 0 there is no SIGTERM. Removes the socket and the scratch directory.
        """
        if self._forking:  # the fork is under way: its pid is about to be told
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._known.wait(), HELLO_WITHIN_S)
        api = self._watches.get("API")
        if api is not None and grace_s > 0 and api.alive():
            api.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._api_gone.wait(), grace_s)
        self._over = True
        clean = await end_tree(self.pid) if self.pid is not None else True
        self._fork_is_over()
        await self._workshop.orphans.end_all()
        for watch in self._watches.values():
            watch.close()
        if self.pid is not None:
            self._workshop.orphans.known.discard(self.pid)
        with contextlib.suppress(OSError):
            os.unlink(self.spec.socket)
        await asyncio.to_thread(shutil.rmtree, self.spec.scratch, ignore_errors=True)
        return clean

    def _on_line(self, line: bytes) -> None:
        try:
            report = decode_report(line)
        except msgspec.DecodeError:
            return
        if self._over:  # a fork that comes too late has no owner: the orphans' sweep ends it
            return
        if isinstance(report, Hello):
            self._fork_is_over()
            if self.pid is None:
                self._watch("API", report.pid)
        elif isinstance(report, Core):
            self.core_pid = report.pid
            self._watch("engine core", report.pid)
        self._post(Reported(self.spec.generation, report))

    def _on_empty(self) -> None:
        if self._forking:  # the zygote ended before it forked
            self._fork_is_over()
            self._known.set()
        self._post(Emptied(self.spec.generation))

    def _fork_is_over(self) -> None:
        if self._forking:
            self._forking = False
            self._workshop.orphans.starting -= 1

    def _watch(self, part: str, pid: int) -> None:
        if part == "API":
            self.pid = pid
            self._known.set()
            self._workshop.orphans.known.add(pid)
            self._workshop.orphans.sessions.add(pid)
        try:
            self._watches[part] = ProcessWatch(pid, lambda status: self._exited(part, pid, status))
        except ProcessLookupError:
            self._exited(part, pid, -signal.SIGKILL)

    def _exited(self, part: str, pid: int, status: int) -> None:
        if part == "API":
            self._api_gone.set()
        self._post(Exited(self.spec.generation, part, pid, status))
