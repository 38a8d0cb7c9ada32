"""The zygote seen from the daemon: started, watched, started again, and asked for workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from loguru import logger

from citadel_supervisor.errors import LaunchError
from citadel_supervisor.workers.launch import LaunchSpec
from citadel_supervisor.workers.lines import OpenOutput
from citadel_supervisor.workers.process import Orphans, ProcessWatch, end_tree, signal_name
from citadel_supervisor.workers.spawn import spawn_python

ZYGOTE_MODULE = "citadel_supervisor.workers.zygote_process"

TITLE_ROOM = " " * 64
"""A further argument: a title cannot be longer than the command line was, and an id has up to 63 letters."""

PRELOAD_WITHIN_S = 300.0
"""Seconds of imports: 7 from a warm page cache, a minute or two from a slow disk."""


@dataclass(frozen=True, slots=True)
class ZygoteStatus:
    """What an operator sees of the zygote."""

    state: str
    """"off", "loading", "ready" or "failed"."""
    pid: int | None = None
    preload_s: float | None = None
    reason: str = ""


class Zygote:
    """Keeps one warm process while `run()` runs.

    A zygote that dies is replaced; its workers live on. One that dies before it was ready is tried
    again with growing pauses, and every waiting launch is told why.
    """

    def __init__(
        self,
        architectures: tuple[str, ...],
        environment: Mapping[str, str],
        orphans: Orphans,
        open_output: OpenOutput,
    ) -> None:
        """`open_output(name)` gives a descriptor to write a process's lines to; it is closed here."""
        self._architectures = architectures
        self._environment = environment
        self._orphans = orphans
        self._open_output = open_output
        self._channel: socket.socket | None = None
        self._settled = asyncio.Event()
        self.status = ZygoteStatus("loading")

    async def run(self) -> None:
        """Keep a zygote until cancelled; then end it."""
        pause = 1.0
        while True:
            lived = await self._one_life()
            pause = 1.0 if lived else min(pause * 2, 60.0)
            await asyncio.sleep(0.05 if lived else pause)

    async def launch(self, spec: LaunchSpec, status: int, output: int) -> int:
        """Have a worker forked; it reports on `status`. Waits for a zygote that is loading.

        Returns the zygote's pid. Raises LaunchError when there is none.
        """
        await self._settled.wait()
        if self._channel is None or self.status.pid is None:
            raise LaunchError(self.status.reason or "the zygote is away")
        try:
            socket.send_fds(self._channel, [msgspec.json.encode(spec)], [status, output])
        except OSError as error:
            raise LaunchError(f"the zygote cannot be reached: {error.strerror}") from error
        return self.status.pid

    def replace(self, pid: int) -> None:
        """End this zygote, which does not do its work, if it is the present one; `run` makes another."""
        if self.status.pid == pid:
            self._away()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _away(self) -> None:
        """From now on launches wait for the next zygote."""
        self._channel = None
        self._settled.clear()

    async def _one_life(self) -> bool:
        """Start a zygote and stay until it ends; whether it ever became ready."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._settled.clear()
        output = await self._open_output("zygote")
        try:
            pid = spawn_python(
                ZYGOTE_MODULE, [str(os.getpid()), *self._architectures, TITLE_ROOM], self._environment,
                channel=theirs.fileno(), output=output,
            )  # fmt: skip
        except LaunchError as error:
            self._fail(str(error))
            ours.close()
            return False
        finally:
            theirs.close()
            os.close(output)
        self._orphans.known.add(pid)
        self._orphans.sessions.add(pid)
        self.status = ZygoteStatus("loading", pid)
        watch = ProcessWatch(pid, ended.set_result)
        try:
            return await self._live(ours, pid, ended)
        finally:
            self._channel = None
            ours.close()
            watch.close()
            await asyncio.shield(end_tree(pid))
            self._orphans.known.discard(pid)

    async def _live(self, ours: socket.socket, pid: int, ended: asyncio.Future[int]) -> bool:
        try:
            async with asyncio.timeout(PRELOAD_WITHIN_S):
                hello = await asyncio.get_running_loop().sock_recv(ours, 4096)
        except TimeoutError:
            self._fail(f"the zygote is not warm after {PRELOAD_WITHIN_S:g} s and is replaced; see its log")
            return False
        if not hello:
            self._fail(f"the zygote ended while loading ({signal_name(await ended)}); see its log")
            return False
        preload_s: float = msgspec.json.decode(hello)["preload_s"]
        self.status = ZygoteStatus("ready", pid, preload_s)
        logger.bind(part="zygote").info("zygote {} is warm after {:.1f} s", pid, preload_s)
        self._channel = ours
        self._settled.set()
        status = await ended
        self._away()
        self.status = ZygoteStatus("loading", reason=f"the last one was lost: {signal_name(status)}")
        logger.bind(part="zygote").warning("zygote {} is lost: {}", pid, signal_name(status))
        return True

    def _fail(self, reason: str) -> None:
        self.status = ZygoteStatus("failed", reason=reason)
        self._settled.set()
        logger.bind(part="zygote").error("{}", reason)
