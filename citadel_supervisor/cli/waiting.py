"""Commands that take time: several at once, with their progress on the terminal meanwhile."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from citadel_supervisor.errors import ControlError, CtlExit

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Call = Callable[[], dict[str, Any]]
Show = Callable[[dict[str, Any]], None]

_SHOWN_EVERY_S = 0.2
_LOOKED_AFTER_EVERY_S = 5.0
"""Without a display the daemon is still asked for a sign of life: a hung one must not hang us."""


@dataclass(slots=True)
class Outcome:
    """How each command ended: the model's status, or why not."""

    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, ControlError] = field(default_factory=dict)


def run_all(calls: dict[str, Call], status: Call, title: str) -> Outcome:
    """Make every call at once and return when all have ended.

    Blocks. Raises ControlError when the daemon itself stops answering `status`; a call that fails is in
    the outcome. An interrupted wait leaves the threads to end with the process.
    """
    answers: queue.SimpleQueue[tuple[str, dict[str, Any] | Exception]] = queue.SimpleQueue()

    def ask(model: str, call: Call) -> None:
        try:
            answers.put((model, call()))
        except Exception as error:  # a bug must end the wait too, and in the thread that can show it
            answers.put((model, error))

    for model, call in calls.items():
        threading.Thread(target=ask, args=(model, call), daemon=True).start()
    outcome = Outcome()
    with _display(list(calls), title) as (show, every_s):
        while len(outcome.done) + len(outcome.failed) < len(calls):
            try:
                model, answer = answers.get(timeout=every_s)
            except queue.Empty:
                _look(status, show)
                continue
            if isinstance(answer, ControlError):
                outcome.failed[model] = answer
            elif isinstance(answer, Exception):
                raise answer
            else:
                outcome.done[model] = answer
    return outcome


def _look(status: Call, show: Show) -> None:
    try:
        show(status())
    except ControlError as error:
        if error.code is not CtlExit.FAILED:  # FAILED: it lives but is busy
            raise


@contextmanager
def _display(models: list[str], title: str) -> Iterator[tuple[Show, float]]:
    """Something that shows a status on standard error, and how often to: on a terminal only."""
    if not sys.stderr.isatty():
        yield (lambda status: None), _LOOKED_AFTER_EVERY_S
        return
    with _spinners() as progress:
        tasks = {model: progress.add_task(f"{title} {model}", total=None) for model in models}
        yield (lambda status: _update(progress, tasks, status)), _SHOWN_EVERY_S


def _spinners() -> Progress:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from citadel_supervisor.cli.session import colourful

    console = Console(stderr=True, no_color=not colourful(sys.stderr))
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _update(progress: Progress, tasks: dict[str, TaskID], status: dict[str, Any]) -> None:
    from citadel_supervisor.cli.render import state_text
    from citadel_supervisor.cli.session import printable

    for model, task in tasks.items():
        if model in status["models"]:
            text = state_text(status["models"][model])
            progress.update(task, description=printable(f"{model}: {text}"))
