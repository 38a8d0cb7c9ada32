"""What takes time in a generation's life: making, checking and ending its processes.

Each step is a task of its own that posts what came of it, tagged with its generation.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType

from loguru import logger

from citadel_supervisor.config import ModelSettings
from citadel_supervisor.errors import CannotEverStart, LaunchError, VerifyError, WorkerError
from citadel_supervisor.events import Event
from citadel_supervisor.workers.generation import Generation, Occurrence
from citadel_supervisor.workers.messages import Ended, Failed, Message, Verified

Step = Callable[[], Coroutine[None, None, None]]

END_AGAIN_S = 1.0
"""Between tries to end processes that did not end, for want of descriptors for instance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What a worker needs of its surroundings; injected, so that tests can stand in."""

    publish: Callable[[Event], None]
    make: Callable[[str, int, Callable[[Occurrence], None]], Generation]
    """`make(model, number, post)`: a new generation, not started."""
    verify: Callable[[str, ModelSettings, Generation], Coroutine[None, None, str]]
    forget: Callable[[str], None] = lambda _address: None
    """Told the address of a generation that is over."""
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.random


class Steps:
    """The steps of one worker's generations. They run while the `async with` block does."""

    def __init__(self, model_id: str, crew: Crew, post: Callable[[Message], None]) -> None:
        self._model_id = model_id
        self._crew = crew
        self._post = post
        self._tasks = asyncio.TaskGroup()
        self._launching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        await self._tasks.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.__aexit__(kind, error, trace)

    def launch(self, generation: Generation, model: ModelSettings) -> None:
        """Make its processes; posts Failed if that cannot be."""
        self._launching = self._begin(generation, lambda: self._launch(generation, model))

    def verify(self, generation: Generation, model: ModelSettings) -> None:
        """Check its known answer; posts Verified or Failed."""
        self._begin(generation, lambda: self._verify(generation, model))

    def end(self, generation: Generation, grace_s: float) -> None:
        """End its processes, launched or being launched; posts Ended once none is left."""
        if self._launching is not None:
            self._launching.cancel()
        self._begin(generation, lambda: self._end(generation, grace_s))

    async def _launch(self, generation: Generation, model: ModelSettings) -> None:
        number = generation.spec.generation
        try:
            await generation.start(model)
        except CannotEverStart as error:
            self._post(Failed(number, str(error), permanent=True))
        except LaunchError as error:
            self._post(Failed(number, str(error)))

    async def _verify(self, generation: Generation, model: ModelSettings) -> None:
        number = generation.spec.generation
        try:
            text = await self._crew.verify(self._model_id, model, generation)
        except VerifyError as error:
            self._post(Failed(number, str(error), permanent=True))
        except WorkerError as error:
            self._post(Failed(number, str(error)))
        else:
            self._post(Verified(number, text))

    async def _end(self, generation: Generation, grace_s: float) -> None:
        log = logger.bind(model=self._model_id)
        number = generation.spec.generation
        while True:
            try:
                if await generation.end(grace_s):
                    break
                log.error("processes of generation {} survive SIGKILL", number)
            except Exception as error:  # whatever it is: nothing new is started while the old may live
                log.opt(exception=error).error("generation {} cannot be ended: {!r}", number, error)
            await asyncio.sleep(END_AGAIN_S)
        self._crew.forget(generation.spec.socket)
        self._post(Ended(number))

    def _begin(self, generation: Generation, step: Step) -> asyncio.Task[None]:
        return self._tasks.create_task(self._contain(generation.spec.generation, step))

    async def _contain(self, number: int, step: Step) -> None:
        """A step that fails in a way nobody foresaw costs its generation, not the supervisor."""
        try:
            await step()
        except Exception as error:
            logger.bind(model=self._model_id).exception("a step of generation {} failed", number)
            self._post(Failed(number, f"{type(error).__name__}: {error}"))
