"""The set of workers: makes them, runs them, and ends them together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from loguru import logger

from citadel_supervisor.config import ModelSettings, Settings
from citadel_supervisor.errors import UnknownModel, UpstreamError, WorkerError
from citadel_supervisor.events import EventBus
from citadel_supervisor.placement import Placement
from citadel_supervisor.states import WorkerState
from citadel_supervisor.workers.generation import Generation, Occurrence, Workshop
from citadel_supervisor.workers.launch import LaunchSpec, engine_argv, engine_environment
from citadel_supervisor.workers.lines import OpenOutput
from citadel_supervisor.workers.memory import tree_memory
from citadel_supervisor.workers.process import MARK, Orphans
from citadel_supervisor.workers.spawn import preload_libraries
from citadel_supervisor.workers.steps import Crew
from citadel_supervisor.workers.verify import check_known_answer
from citadel_supervisor.workers.watch import WorkerWatch
from citadel_supervisor.workers.worker import Worker
from citadel_supervisor.workers.zygote import Zygote, ZygoteStatus

AskAddress = Callable[[str, str, str, bytes], Awaitable[tuple[int, bytes]]]
"""`ask(address, method, path, body)`: one HTTP exchange with the engine at a unix socket."""

LOOK_EVERY_S = 5.0
STOPPING = "the supervisor is stopping"


def worker_socket(runtime: Path, model: str, generation: int) -> Path:
    """Where a generation's engine listens."""
    return runtime / "workers" / f"{model}.{generation}.sock"


class Fleet:
    """Every worker, by model id, in configuration order. `run()` keeps them alive."""

    def __init__(
        self,
        settings: Settings,
        placement: Placement,
        bus: EventBus,
        ask: AskAddress,
        forget: Callable[[str], None],
        open_output: OpenOutput,
    ) -> None:
        """`ask` speaks HTTP to an engine; `forget` drops its idle connections."""
        self._settings = settings
        self._placement = placement
        self._ask = ask
        self._runtime = settings.runtime
        self._preload = preload_libraries()
        self._orphans = Orphans(self._runtime)
        self.zygote = self._make_zygote(open_output)
        workshop = Workshop(
            zygote=self.zygote,
            orphans=self._orphans,
            environment=self._environment,
            open_output=open_output,
        )
        self._workshop = workshop
        self.memory: dict[str, int] = {}
        """Proportional set size of each worker's tree in bytes, measured every few seconds."""
        crew = Crew(publish=bus.publish, make=self._make, verify=self._verify, forget=forget)
        self.workers: dict[str, Worker] = {
            name: Worker(name, model, settings.workers, crew, settings.gateway.max_waiting)
            for name, model in settings.models.items()
        }

    def worker(self, model: str) -> Worker:
        """The worker of a model. Raises UnknownModel."""
        try:
            return self.workers[model]
        except KeyError:
            raise UnknownModel(model, list(self.workers)) from None

    def zygote_status(self) -> ZygoteStatus:
        """What an operator sees of the zygote."""
        return self.zygote.status if self.zygote is not None else ZygoteStatus("off")

    async def run(self) -> None:
        """Run every worker, its watch and the zygote until cancelled; then end what is left."""
        async with asyncio.TaskGroup() as tasks:
            if self.zygote is not None:
                tasks.create_task(_kept_going(self.zygote.run), name="zygote")
            for name, worker in self.workers.items():
                tasks.create_task(worker.run(), name=f"worker {name}")
                watch = WorkerWatch(worker, self._settings.workers.health, self._ask_worker(worker))
                tasks.create_task(_kept_going(watch.run), name=f"watch {name}")
                if self._settings.models[name].enabled:
                    worker.start()
            tasks.create_task(_kept_going(self._look_around), name="look around")

    async def stop(self, drain_s: float | None = None) -> None:
        """Drain and stop every worker at once; returns when no process of theirs is left."""
        for worker in self.workers.values():
            worker.stop(drain_s, STOPPING)
        for worker in self.workers.values():
            await worker.settled()

    async def settled(self) -> None:
        """Return once every worker is ready, stopped or quarantined."""
        for worker in self.workers.values():
            await worker.settled()

    def apply(self, settings: Settings, placement: Placement, changed: list[str]) -> None:
        """Take over new settings; workers of `changed` models get a new generation of theirs."""
        before, self._settings, self._placement = self._settings, settings, placement
        for name in changed:
            worker, model = self.workers[name], settings.models[name]
            worker.model = model
            if before.models[name].enabled and not model.enabled:
                worker.stop(reason="disabled in the configuration")
            elif model.enabled and (not before.models[name].enabled or worker.wanted == "running"):
                worker.restart(reason="its configuration changed")

    def all_ready(self) -> bool:
        """Whether every enabled model is ready."""
        return all(
            worker.snapshot().state is WorkerState.READY
            for name, worker in self.workers.items()
            if self._settings.models[name].enabled
        )

    def _make_zygote(self, open_output: OpenOutput) -> Zygote | None:
        forked = [model for model in self._settings.models.values() if not model.spawns]
        if not self._settings.workers.zygote or not forked:
            return None
        architectures = tuple(dict.fromkeys(name for model in forked for name in _architectures(model)))
        scratch = self._runtime / "zygote"
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        environment = engine_environment(
            os.environ, threads=None, cache=self._cache, scratch=scratch, preload=self._preload
        )
        return Zygote(architectures, environment | self._mark(), self._orphans, open_output)

    @property
    def _cache(self) -> Path:
        return self._settings.state_dir / "cache"

    def _mark(self) -> dict[str, str]:
        # Without SPT_NOENV a process that gives itself a title overwrites its environment with it, and no
        # mark can be read any more.
        return {MARK: str(self._runtime), "SPT_NOENV": "1"}

    def _environment(self, spec: LaunchSpec, model: ModelSettings) -> Mapping[str, str]:
        environment = engine_environment(
            os.environ,
            threads=spec.threads,
            cache=self._cache,
            scratch=Path(spec.scratch),
            preload=self._preload,
        )
        if model.device == "cuda":
            for name in ("CUDA_VISIBLE_DEVICES", "VLLM_ENABLE_V1_MULTIPROCESSING", "LD_PRELOAD"):
                environment.pop(name, None)
        return environment | model.env | self._mark()

    def _make(self, name: str, number: int, post: Callable[[Occurrence], None]) -> Generation:
        model = self._settings.models[name]
        cpus = self._placement.cpus[name]
        place = self._runtime / "workers"
        spec = LaunchSpec(
            model=name,
            generation=number,
            socket=str(worker_socket(self._runtime, name, number)),
            scratch=str(place / f"{name}.{number}"),
            cache=str(self._cache),
            cpus=cpus,
            threads=self._placement.threads[name],
            argv=engine_argv(name, model),
            device=model.device,
            supervisor_pid=os.getpid(),
            stop_grace_s=self._settings.workers.stop_grace_s,
        )
        return Generation(spec, self._workshop, post)

    async def _verify(self, name: str, model: ModelSettings, generation: Generation) -> str:
        async def ask(method: str, path: str, body: bytes) -> tuple[int, bytes]:
            return await self._ask(generation.spec.socket, method, path, body)

        records = self._settings.state_dir / "known_answers"
        records.mkdir(parents=True, exist_ok=True)
        tolerance = self._settings.workers.known_answer_tolerance
        try:
            return await check_known_answer(ask, name, model, records, tolerance)
        except UpstreamError as error:
            raise WorkerError(f"the engine went away during its known-answer check: {error}") from error

    def _ask_worker(self, worker: Worker) -> Callable[[str, str, bytes], Awaitable[tuple[int, bytes]]]:
        async def ask(method: str, path: str, body: bytes) -> tuple[int, bytes]:
            generation = worker.generation
            if generation is None:
                raise ConnectionError("no generation")
            try:
                return await self._ask(generation.spec.socket, method, path, body)
            except UpstreamError as error:
                raise ConnectionError(str(error)) from error

        return ask

    async def _look_around(self) -> None:
        """Measure memory and end orphans, every few seconds."""
        while True:
            leaders = {
                name: worker.generation.pid if worker.generation is not None else None
                for name, worker in self.workers.items()
            }
            self.memory = await asyncio.to_thread(tree_memory, leaders)
            self._orphans.sweep()  # what a living worker's processes left behind
            await asyncio.sleep(LOOK_EVERY_S)


async def _kept_going(run: Callable[[], Awaitable[None]]) -> None:
    """Run something that only watches or helps, for ever: a bug in it is logged, never the daemon's end."""
    while True:
        try:
            await run()
        except Exception as error:
            logger.opt(exception=error).error("a bug in a task that goes on: {!r}", error)
        await asyncio.sleep(1.0)


def _architectures(model: ModelSettings) -> list[str]:
    """What the checkpoint's config.json names; nothing where it cannot be read (the worker will say)."""
    import msgspec

    try:
        config = msgspec.json.decode((model.checkpoint_path / "config.json").read_bytes(), type=dict)
    except (OSError, msgspec.DecodeError):
        return []
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []
