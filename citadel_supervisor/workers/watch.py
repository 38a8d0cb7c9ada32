"""Watching one worker: takes the readings that `health` judges, and tells the worker of a verdict."""

from __future__ import annotations

import asyncio
import os
import re

from loguru import logger

from citadel_supervisor.config import HealthSettings
from citadel_supervisor.states import WorkerSnapshot, WorkerState
from citadel_supervisor.workers.generation import Generation
from citadel_supervisor.workers.health import Diagnosis, Reading
from citadel_supervisor.workers.process import read_process
from citadel_supervisor.workers.verify import Ask
from citadel_supervisor.workers.worker import Worker

S = WorkerState
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
TOKENS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? ([\d.e+]+)", re.MULTILINE)


class WorkerWatch:
    """Looks at a worker every `check_interval_s` seconds while `run()` runs."""

    def __init__(self, worker: Worker, settings: HealthSettings, ask: Ask) -> None:
        """`ask` speaks to the present generation and gives up by itself."""
        self._worker = worker
        self._settings = settings
        self._ask = ask
        self._number = 0
        self._diagnosis = Diagnosis(settings)
        self._failed_probes = 0
        self._probe_due = 0.0
        self._tokens: tuple[float, ...] = ()

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._settings.check_interval_s)
            seen = self._worker.snapshot()
            generation = self._worker.generation
            if generation is None or not seen.launch or seen.state in (S.STOPPING, S.FAILED):
                continue  # without a launch it still waits for the zygote, which has a bound of its own
            if seen.generation != self._number:
                self._begin(seen, loop.time())
            reading = await self._read(seen, generation, loop.time())
            verdict = self._diagnosis.judge(reading)
            if verdict is not None and self._worker.snapshot().generation == seen.generation:
                logger.bind(model=seen.model).warning("generation {} is {}", seen.generation, verdict)
                self._worker.unhealthy(seen.generation, verdict)
                self._number = 0

    def _begin(self, seen: WorkerSnapshot, now: float) -> None:
        self._number = seen.generation
        self._diagnosis = Diagnosis(self._settings)
        self._failed_probes = 0
        self._probe_due = now + self._settings.probe_interval_s
        self._tokens = ()

    async def _read(self, seen: WorkerSnapshot, generation: Generation, now: float) -> Reading:
        serving = seen.state in (S.READY, S.DRAINING)
        work = seen.active_requests if serving else int(seen.state is S.VERIFYING)
        entries = {pid: read_process(pid) for pid in generation.pids()}
        stopped = ""
        for pid, part in ((generation.core_pid, "engine core"), (generation.pid, "API process")):
            entry = entries.get(pid) if pid is not None else None
            if entry is not None and entry.state == "T":
                stopped = part
        # A stopped API process answers nothing: a question would only put the next look off by its time-out.
        if serving and now >= self._probe_due and stopped != "API process":
            await self._probe(now)
        if serving and work and stopped != "API process":
            await self._count_tokens()
        core = entries.get(generation.core_pid or generation.pid or 0)
        return Reading(
            at=now,
            loading=seen.state in (S.STARTING, S.LOADING),
            work=work,
            cpu_s=core.cpu_ticks / TICKS_PER_S if core is not None else 0.0,
            stopped=stopped,
            marks=self._tokens if serving else self._worker.loaded_marks,
            failed_probes=self._failed_probes,
        )

    async def _probe(self, now: float) -> None:
        self._probe_due = now + self._settings.probe_interval_s
        answer = await self._get("/health")
        self._failed_probes = 0 if answer is not None else self._failed_probes + 1

    async def _count_tokens(self) -> None:
        answer = await self._get("/metrics")
        if answer is not None:
            self._tokens = tuple(float(value) for value in TOKENS.findall(answer))

    async def _get(self, path: str) -> bytes | None:
        """The body of a good answer within the probe's time-out, else None."""
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                status, body = await self._ask("GET", path, b"")
        except (OSError, TimeoutError):
            return None
        return body if status == 200 else None
