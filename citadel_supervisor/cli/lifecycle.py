"""start, stop, restart and drain: on several models at once, or one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from citadel_supervisor.cli.session import Session, error_json, printable, report, write_json
from citadel_supervisor.cli.waiting import Call, Outcome, run_all
from citadel_supervisor.errors import ControlError, CtlExit

if TYPE_CHECKING:
    from citadel_supervisor.control.client import ControlClient

SETTLED_AS = {"start": "ready", "stop": "stopped", "restart": "ready", "drain": "draining"}
"""The state in which a command that was waited for has worked."""
DOING = {"start": "starting", "stop": "stopping", "restart": "restarting", "drain": "draining"}
ALL = "all"


def command_models(
    session: Session,
    action: str,
    models: tuple[str, ...],
    no_wait: bool,
    timeout_s: float | None,
    options: dict[str, float | None],
) -> None:
    """Run one of the four commands on every model named, tell how each ended, and exit accordingly."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with session.client() as client:
        ids = _resolve(client, action, models)
        calls = {one: _call(client, action, one, not no_wait, deadline, options) for one in ids}
        batches = [{one: call} for one, call in calls.items()] if action == "restart" else [calls]
        outcome = Outcome()
        for batch in batches:
            ended = run_all(batch, client.status, DOING[action])
            outcome.done |= ended.done
            outcome.failed |= ended.failed
            if not no_wait:
                _judge(action, ended.done, outcome)
            if outcome.failed:
                break
    skipped = [one for one in ids if one not in outcome.done and one not in outcome.failed]
    _tell(session, action, no_wait, outcome, skipped)


def _resolve(client: ControlClient, action: str, models: tuple[str, ...]) -> list[str]:
    """The ids that are meant, each once. Raises ControlError before anything is done to any of them."""
    if ALL in models:
        known = client.status()["models"]
        # To restart what an operator has stopped on purpose would be to start it.
        return [one for one, data in known.items() if action != "restart" or data["state"] != "stopped"]
    return list(dict.fromkeys(client.model(model)["id"] for model in models))


def _call(
    client: ControlClient,
    action: str,
    model: str,
    wait: bool,
    deadline: float | None,
    options: dict[str, float | None],
) -> Call:
    def call() -> dict[str, Any]:
        method: Callable[..., dict[str, Any]] = getattr(client, action)
        left = None if deadline is None else max(0.001, deadline - time.monotonic())
        try:
            return method(model, wait=wait, timeout_s=left, **options)
        except ControlError as error:
            if error.code is not CtlExit.TIMED_OUT:
                raise
            text = f"not {SETTLED_AS[action]} in time; it goes on: see citadelctl status {model}"
            raise ControlError(text, CtlExit.TIMED_OUT) from None

    return call


def _judge(action: str, done: dict[str, dict[str, Any]], outcome: Outcome) -> None:
    """Whether what was waited for has come; a model that settled as something else has failed."""
    for model, data in done.items():
        if data["state"] != SETTLED_AS[action]:
            reason = f": {data['reason']}" if data["reason"] else ""
            outcome.failed[model] = ControlError(data["state"].replace("_", " ") + reason, CtlExit.FAILED)


def _tell(session: Session, action: str, no_wait: bool, outcome: Outcome, skipped: list[str]) -> None:
    """Show how each model ended. Raises SystemExit with the first failure's code if there is one."""
    if session.as_json:
        errors = {model: error_json(error) for model, error in outcome.failed.items()}
        write_json({"models": outcome.done, "errors": errors, "skipped": skipped})
    else:
        from citadel_supervisor.cli.render import state_text

        for model, data in outcome.done.items():
            if model not in outcome.failed:
                click.echo(printable(f"{model}: {DOING[action] if no_wait else state_text(data)}"))
        for model, error in outcome.failed.items():
            text = str(error) if f"'{model}'" in str(error) else f"{model}: {error}"
            report(session, ControlError(text, error.code))
        if skipped:
            click.echo(f"citadelctl: left as they were: {', '.join(skipped)}", err=True)
    for error in outcome.failed.values():
        raise SystemExit(error.code)
