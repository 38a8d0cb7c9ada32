"""One worker's lifecycle. One task owns the state; everyone else posts a request or reads a snapshot.

Everything that happens to a worker is a message in its inbox: what an operator asks, what the
generation's processes report, what a timer or a check finds. `run()` takes them one by one. Slow
things (making, checking and ending processes) are tasks of their own that post what came of them,
tagged with their generation, so that news of an old one is recognised.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Literal

from loguru import logger

from citadel_supervisor.config import ModelSettings, WorkerSettings
from citadel_supervisor.errors import CommandRefused, NotReady, WorkerExit
from citadel_supervisor.events import Transition, WorkerExited
from citadel_supervisor.states import SETTLED, TRANSITIONS, Progress, WorkerSnapshot, WorkerState
from citadel_supervisor.workers.backoff import RestartBudget
from citadel_supervisor.workers.changes import Changes
from citadel_supervisor.workers.generation import Emptied, Exited, Generation, Reported
from citadel_supervisor.workers.launch import Core, Fatal, Hello, Loading, Report, Serving
from citadel_supervisor.workers.leases import Leases, WorkerLease
from citadel_supervisor.workers.messages import (
    Drain,
    DrainOver,
    Ended,
    Failed,
    Message,
    RetryDue,
    Start,
    Stop,
    Verified,
)
from citadel_supervisor.workers.process import signal_name
from citadel_supervisor.workers.steps import Crew, Steps

S = WorkerState
Wanted = Literal["running", "drained", "stopped"]


class Worker:
    """The supervised engine of one model."""

    def __init__(
        self, model_id: str, model: ModelSettings, policy: WorkerSettings, crew: Crew, max_waiting: int
    ) -> None:
        self.model_id = model_id
        self.model = model
        self._policy = policy
        self._crew = crew
        self._max_waiting = max_waiting
        self._waiting = 0
        self._changes = Changes()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._steps = Steps(model_id, crew, self._inbox.put_nowait)
        self._seen = WorkerSnapshot(model_id, since=time.time())
        self._wanted: Wanted = "stopped"
        self._generation: Generation | None = None
        self._fatal: Fatal | None = None
        self._stop_reason = ""
        self._leases = Leases(self._on_idle)
        self._drain_timer: asyncio.TimerHandle | None = None
        self._ends_after_drain = False
        self._retry_timer: asyncio.TimerHandle | None = None
        self._budget = RestartBudget(policy.backoff)
        self._began_at = 0.0
        self.loaded_marks: tuple[float, ...] = ()

    # What others may ask. None of these moves the state.

    def snapshot(self) -> WorkerSnapshot:
        """The worker at this moment."""
        launch = self._generation.launch if self._generation is not None else ""
        return replace(
            self._seen, active_requests=len(self._leases), waiting_requests=self._waiting, launch=launch
        )

    @property
    def wanted(self) -> Wanted:
        """What an operator or the configuration last asked for."""
        return self._wanted

    @property
    def generation(self) -> Generation | None:
        """The present generation, for those who watch its processes."""
        return self._generation

    @property
    def address(self) -> str | None:
        """The present generation's HTTP address, None without one."""
        return self._generation.spec.socket if self._generation is not None else None

    def start(self) -> None:
        """Ask for it to run; forgets earlier losses."""
        self._inbox.put_nowait(Start())

    def stop(self, drain_s: float | None = None, reason: str = "stopped by an operator") -> None:
        """Ask for it to stop after at most `drain_s` seconds for the requests in flight."""
        self._inbox.put_nowait(Stop(self._policy.drain_s if drain_s is None else drain_s, reason))

    def restart(self, drain_s: float | None = None, reason: str = "restart asked by an operator") -> None:
        """Ask for a new generation; requests that arrive meanwhile wait for it."""
        seconds = self._policy.drain_s if drain_s is None else drain_s
        self._inbox.put_nowait(Stop(seconds, reason, again=True))

    def drain(self) -> None:
        """Ask for no new requests; raises CommandRefused unless it is ready."""
        if self._seen.state not in (S.READY, S.DRAINING):
            raise CommandRefused(
                f"model '{self.model_id}' is {self._seen.state}; only a ready one can be drained"
            )
        self._inbox.put_nowait(Drain())

    def unhealthy(self, generation: int, reason: str) -> None:
        """Report a generation that lives but does not work: it is replaced."""
        self._inbox.put_nowait(Failed(generation, reason))

    async def settled(self) -> WorkerSnapshot:
        """Return once all that was asked so far is done and nothing is under way."""
        await self._changes.until(self._is_settled)
        return self.snapshot()

    async def lease(self, wait_s: float) -> WorkerLease:
        """Use of the ready generation; see gateway.backend.Backend.lease."""
        if self._seen.state is not S.READY:
            await self._until_ready(wait_s)
        generation = self._generation
        assert generation is not None
        return self._leases.add(generation)

    # The one task.

    async def run(self) -> None:
        """Own the state until cancelled; a generation that is left then is killed."""
        try:
            async with self._steps:
                while True:
                    self._handle_contained(await self._inbox.get())
        finally:
            self._leases.cut("the supervisor is stopping")
            if self._generation is not None:
                await asyncio.shield(self._generation.end(0))

    def _handle_contained(self, message: Message) -> None:
        """A message that cannot be handled costs the generation, not the supervisor."""
        try:
            self._handle(message)
        except Exception as error:
            logger.bind(model=self.model_id).exception("a bug: {} could not be handled", message)
            if not isinstance(message, Failed):
                self._inbox.put_nowait(Failed(self._seen.generation, f"a bug: {error!r}"))

    def _handle(self, message: Message) -> None:
        match message:
            case Start():
                self._on_start()
            case Stop(drain_s, reason, again):
                self._on_stop(drain_s, reason, again)
            case Drain():
                self._on_drain()
            case _ if message.generation != self._seen.generation:
                pass
            case Reported(_, report):
                self._on_report(report)
            case Exited(_, part, pid, status):
                self._on_exit(part, pid, status)
            case Emptied() if self._generation is not None and self._generation.pid is None:
                self._lose(self._fatal.message if self._fatal else "its processes ended before they reported")
            case Failed(_, reason, permanent):
                self._lose(reason, permanent=permanent)
            case Verified(_, text):
                self._on_verified(text)
            case DrainOver():
                self._on_drain_over()
            case Ended():
                self._on_ended()
            case RetryDue():
                if self._seen.state is S.BACKING_OFF:
                    self._begin(lost=True)
        self._changes.tell()

    # What an operator asked.

    def _on_start(self) -> None:
        self._wanted = "running"
        state = self._seen.state
        if state in (S.STOPPED, S.QUARANTINED, S.BACKING_OFF):
            self._budget = RestartBudget(self._policy.backoff)
            self._begin(lost=False)
        elif state is S.DRAINING and not self._ends_after_drain:
            self._move(S.READY, "put back by an operator")

    def _on_stop(self, drain_s: float, reason: str, again: bool) -> None:
        self._wanted = "running" if again else "stopped"
        self._stop_reason = reason
        match self._seen.state:
            case S.READY | S.DRAINING:
                if self._seen.state is S.READY:
                    self._move(S.DRAINING, reason)
                self._ends_after_drain = True
                self._await_idle(drain_s)
            case S.STARTING | S.LOADING | S.VERIFYING:
                self._move(S.STOPPING, reason)
                self._end(self._policy.stop_grace_s)
            case S.BACKING_OFF | S.QUARANTINED | S.STOPPED if again:
                self._budget = RestartBudget(self._policy.backoff)
                self._begin(lost=False)
            case S.BACKING_OFF | S.QUARANTINED:
                self._move(S.STOPPED, reason)
            case _:
                pass

    def _on_drain(self) -> None:
        if self._seen.state is S.READY:
            self._wanted = "drained"
            self._ends_after_drain = False
            self._move(S.DRAINING, "drained by an operator; the engine stays loaded until start or stop")

    # What the generation's processes said.

    def _on_report(self, report: Report) -> None:
        match report:
            case Hello(pid):
                self._seen = replace(self._seen, pid=pid)
                if self._seen.state is S.STARTING:
                    self._move(S.LOADING)
            case Core(pid):
                self._seen = replace(self._seen, core_pid=pid)
            case Loading(phase, done, total):
                self._seen = replace(self._seen, progress=Progress(phase, done, total))
                self.loaded_marks = (*self.loaded_marks[-1:], float(done), float(hash(phase)))
            case Serving() if self._seen.state is S.LOADING:
                self._move(S.VERIFYING)
                assert self._generation is not None
                self._steps.verify(self._generation, self.model)
            case Fatal():
                # The first is the cause, those after it are its consequences.
                self._fatal = self._fatal or report
                if self._seen.state is S.FAILED:
                    self._seen = replace(self._seen, reason=self._fatal.message)

    def _on_exit(self, part: str, pid: int, status: int) -> None:
        state = self._seen.state
        expected = state is S.STOPPING
        number = self._seen.generation
        self._crew.publish(
            WorkerExited(
                model=self.model_id, generation=number, part=part, pid=pid, status=status, expected=expected
            )
        )
        if part == "API" and status == WorkerExit.CANNOT_EVER_START and self._fatal is None:
            self._fatal = Fatal("the engine says that no restart will help; see its log", permanent=True)
        if not expected:
            permanent = self._fatal is not None and self._fatal.permanent
            reason = self._fatal.message if self._fatal else f"{part} (pid {pid}) {signal_name(status)}"
            self._lose(reason, permanent=permanent)

    def _on_verified(self, text: str) -> None:
        if self._seen.state is S.VERIFYING:
            took = self._crew.clock() - self._began_at
            self._seen = replace(self._seen, ready_after_s=round(took, 3))
            self._move(S.READY, text)
            if self._wanted == "drained":
                self._move(S.DRAINING, "drained by an operator before its engine was lost")

    # Moving on.

    def _begin(self, *, lost: bool) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        number = self._seen.generation + 1
        self._fatal = None
        self._ends_after_drain = False
        self._began_at = self._crew.clock()
        generation = self._generation = self._crew.make(self.model_id, number, self._inbox.put_nowait)
        self._seen = replace(
            self._seen, generation=number, restarts=self._seen.restarts + lost, pid=None, core_pid=None,
            progress=Progress("process"), ready_after_s=None, cpus=generation.spec.cpus,
        )  # fmt: skip
        self._move(S.STARTING)
        self._steps.launch(generation, self.model)

    def _await_idle(self, drain_s: float) -> None:
        number = self._seen.generation
        if not self._leases or drain_s <= 0:
            self._inbox.put_nowait(DrainOver(number))
        else:
            loop = asyncio.get_running_loop()
            self._drain_timer = loop.call_later(drain_s, self._inbox.put_nowait, DrainOver(number))

    def _on_drain_over(self) -> None:
        if self._seen.state is S.DRAINING and self._ends_after_drain:
            left = len(self._leases)
            self._move(S.STOPPING, f"{left} requests were still in flight" if left else "")
            self._end(self._policy.stop_grace_s)

    def _lose(self, reason: str, *, permanent: bool = False) -> None:
        """The generation is lost, unless it is already being ended."""
        if self._seen.state in (S.STARTING, S.LOADING, S.VERIFYING, S.READY, S.DRAINING):
            if permanent:
                self._fatal = Fatal(reason, permanent=True)
            self._move(S.FAILED, reason)
            self._end(0)

    def _end(self, grace_s: float) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        generation = self._generation
        assert generation is not None
        self._leases.cut(self._seen.reason or "the worker is stopping")
        self._steps.end(generation, grace_s)

    def _on_ended(self) -> None:
        """No process is left: what comes next depends on what is wanted now."""
        self._generation = None
        self._seen = replace(self._seen, pid=None, core_pid=None, progress=Progress())
        if self._wanted == "stopped":
            self._move(S.STOPPED, self._seen.reason if self._seen.state is S.FAILED else self._stop_reason)
        elif self._seen.state is S.STOPPING:
            self._begin(lost=False)
        else:
            self._back_off()

    def _back_off(self) -> None:
        reason = self._fatal.message if self._fatal else self._seen.reason
        self._seen = replace(self._seen, last_loss=reason)
        pause = self._budget.spend(self._crew.clock(), self._crew.random())
        if self._fatal is not None and self._fatal.permanent:
            self._move(S.QUARANTINED, reason)
        elif pause is None:
            window_s = self._policy.backoff.window_s
            text = f"lost {self._budget.lost} generations within {window_s:g} s; the last: {reason}"
            self._move(S.QUARANTINED, text)
        else:
            self._move(S.BACKING_OFF, f"next start in {pause:.1f} s; {reason}" if pause else reason)
            retry = RetryDue(self._seen.generation)
            self._retry_timer = asyncio.get_running_loop().call_later(pause, self._inbox.put_nowait, retry)

    def _move(self, after: WorkerState, reason: str = "") -> None:
        before = self._seen.state
        assert after in TRANSITIONS[before], f"{before} -> {after}"
        self._seen = replace(self._seen, state=after, reason=reason, since=time.time())
        self._crew.publish(
            Transition(
                model=self.model_id,
                generation=self._seen.generation,
                before=before,
                after=after,
                reason=reason,
            )
        )
        self._changes.tell()

    # Leases and those who wait.

    async def _until_ready(self, wait_s: float) -> None:
        if self._waiting >= self._max_waiting:
            raise NotReady(self.model_id, self._seen.state, f"{self._waiting} requests wait already", 5.0)
        self._waiting += 1
        try:
            await self._changes.until(lambda: self._seen.ready or not self._may_come(), wait_s)
        finally:
            self._waiting -= 1
        if not self._seen.ready:
            raise NotReady(self.model_id, self._seen.state, self._why_not(), self._retry_after_s())

    def _may_come(self) -> bool:
        """Whether a generation that takes requests is on its way."""
        return self._wanted == "running" and self._seen.state not in (S.QUARANTINED, S.STOPPED)

    def _why_not(self) -> str:
        return self._seen.reason or self._seen.progress.text()

    def _retry_after_s(self) -> float:
        return 5.0 if self._may_come() else 30.0

    def _on_idle(self) -> None:
        if self._seen.state is S.DRAINING and self._ends_after_drain:
            self._inbox.put_nowait(DrainOver(self._seen.generation))
        self._changes.tell()

    def _is_settled(self) -> bool:
        state = self._seen.state
        held = state is S.DRAINING and not self._ends_after_drain and not self._leases
        return self._inbox.empty() and (state in SETTLED or held)
