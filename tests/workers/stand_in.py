"""A worker whose generations have no processes: the test says what happens to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from citadel_supervisor.config import ModelSettings, WorkerSettings
from citadel_supervisor.errors import VerifyError
from citadel_supervisor.events import Event, Transition
from citadel_supervisor.states import WorkerState
from citadel_supervisor.workers.generation import Exited, Generation, Occurrence, Reported
from citadel_supervisor.workers.launch import Core, Hello, LaunchSpec, Loading, Report, Serving
from citadel_supervisor.workers.steps import Crew
from citadel_supervisor.workers.worker import Worker


class StandIn(Generation):
    """Starts when told to, ends at once or (`slow_end`) when told to."""

    def __init__(self, number: int, post: Callable[[Occurrence], None], stage: Stage) -> None:
        spec = LaunchSpec(
            model="alpha", generation=number, socket=f"/nowhere/{number}", scratch="/nowhere/scratch",
            cache="/nowhere/cache", cpus=(0,), threads=1, argv=(), device="cpu",
            supervisor_pid=1, stop_grace_s=1,
        )  # fmt: skip
        super().__init__(spec, cast(Any, None), post)
        self._stage = stage
        self.ended = False
        self.may_end = asyncio.Event()
        if not stage.slow_end:
            self.may_end.set()
        self.verified: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.graces: list[float] = []

    async def start(self, model: ModelSettings) -> None:
        self.launch = "spawn"
        if self._stage.start_fails is not None:
            raise self._stage.start_fails
        if self._stage.by_itself:
            self.come_up()

    async def end(self, grace_s: float) -> bool:
        self.graces.append(grace_s)
        await self.may_end.wait()
        self.ended = True
        return True

    def alive(self) -> bool:
        return not self.ended

    def report(self, report: Report) -> None:
        if isinstance(report, Hello):
            self.pid = report.pid
        self._post(Reported(self.spec.generation, report))

    def exit(self, part: str = "API", status: int = -9) -> None:
        self._post(Exited(self.spec.generation, part, 100, status))

    def come_up(self) -> None:
        """As far as verifying; then it is right."""
        for report in (Hello(100), Core(101), Loading("weights", 1, 2), Serving()):
            self.report(report)
        if not self.verified.done():
            self.verified.set_result("right")


class Stage:
    """One worker, its generations so far and its events. `async with` runs it."""

    def __init__(
        self,
        policy: dict[str, Any] | None = None,
        *,
        max_waiting: int = 10,
        by_itself: bool = True,
        slow_end: bool = False,
        clock: Callable[[], float] = lambda: 0.0,
        random: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self.by_itself = by_itself
        self.slow_end = slow_end
        self.start_fails: Exception | None = None
        self.generations: list[StandIn] = []
        self.events: list[Event] = []
        crew = Crew(
            publish=self.events.append, make=self._make, verify=self._verify, clock=clock, random=random
        )
        model = ModelSettings(port=0, checkpoint="/nowhere")
        settings = WorkerSettings.model_validate(policy or {"backoff": {"initial_s": 1e-4, "restarts": 50}})
        self.worker = Worker("alpha", model, settings, crew, max_waiting)
        self.task: asyncio.Task[None]

    async def __aenter__(self) -> Stage:
        self.task = asyncio.create_task(self.worker.run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        self.slow_end = False
        for generation in self.generations:
            generation.may_end.set()
        await asyncio.wait([self.task])
        assert self.task.cancelled(), "the worker's task must not end by itself"

    @property
    def last(self) -> StandIn:
        return self.generations[-1]

    def moves(self) -> list[Transition]:
        return [event for event in self.events if isinstance(event, Transition)]

    def states(self) -> list[WorkerState]:
        return [move.after for move in self.moves()]

    async def until(self, state: WorkerState) -> None:
        async with asyncio.timeout(10):
            await self.worker._changes.until(lambda: self.worker.snapshot().state is state)

    async def quiet(self) -> None:
        """Let everything that can happen without time passing happen."""
        for _ in range(20):
            await asyncio.sleep(0)

    def _make(self, model: str, number: int, post: Callable[[Occurrence], None]) -> Generation:
        assert all(generation.ended for generation in self.generations), "two generations at a time"
        self.generations.append(StandIn(number, post, self))
        return self.generations[-1]

    async def _verify(self, name: str, model: ModelSettings, generation: Generation) -> str:
        text = await cast(StandIn, generation).verified
        if text == "wrong":
            raise VerifyError("wrong")
        return text
