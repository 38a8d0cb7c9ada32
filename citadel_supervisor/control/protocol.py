"""The control API's contract: what the server asks of the daemon, and what both ends of the socket say.

The API is HTTP and JSON over a unix socket. Errors are `{"error": {"message", "code"}}`, `code` one of
`ErrorCode`; a refused configuration adds `problems`, an unknown model adds `known`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from citadel_supervisor.errors import CitadelError, CommandRefused, ConfigError, CtlExit, UnknownModel

API = "v1"
BASE_URL = "http://citadel"
"""The host name means nothing on a unix socket; HTTP wants one."""

MAX_BODY = 64 * 1024
"""Largest request body, in bytes."""
DEFAULT_LOG_LINES = 100
MAX_LOG_LINES = 100_000


class SupervisorApi(Protocol):
    """What the control server asks of the daemon.

    Every call runs in the daemon's event loop. The plain ones must not block: `status` is polled
    several times a second while an operator waits. A command takes effect when it is called;
    cancelling the call (its client went away) ends the waiting, never the command.
    """

    def status(self) -> dict[str, Any]:
        """The whole, JSON-ready.

        "version", "uptime_s" (seconds), "pid", "ready" and "draining" (of the daemon), "memory_bytes" (its
        resident set), "config" (the file's path or None), "ports" ("router", "metrics", "health"),
        "zygote" ("state", "pid", "preload_s" in seconds), and "models": by id, each with
        "id", "state", "reason", "port", "pid", "core_pid", "generation", "restarts", "last_loss" (why),
        "cpus" (a list), "memory_bytes" (proportional set size of the worker's process tree),
        "active_requests", "waiting_requests", "since" (ISO 8601 with its timezone), "progress" (text),
        "launch", "checkpoint", "ready_after_s" (seconds, None before).
        """
        ...

    async def start(self, model: str, wait: bool) -> dict[str, Any]:
        """Bring `model` up; with `wait`, return when it is ready, stopped or quarantined.

        Returns the model's part of `status`. Raises UnknownModel and CommandRefused, as all four commands do.
        """
        ...

    async def stop(self, model: str, wait: bool, drain_s: float | None) -> dict[str, Any]:
        """End `model`. `drain_s`: seconds for requests in flight to finish; None: as configured."""
        ...

    async def restart(self, model: str, wait: bool, drain_s: float | None) -> dict[str, Any]:
        """Give `model` a new generation. With `wait`, return when that has settled."""
        ...

    async def drain(self, model: str, wait: bool) -> dict[str, Any]:
        """Finish what runs and take nothing new; the engine stays loaded until `start` or `stop`."""
        ...

    async def reload(self) -> dict[str, Any]:
        """Read the configuration again: {"changed": [...], "unchanged": [...], "restart_needed": [...]}.

        Raises ConfigError, and then nothing was changed. Never cancelled, never called twice at once.
        """
        ...

    def recent_events(self) -> list[dict[str, Any]]:
        """The kept events, JSON-ready, oldest first."""
        ...

    def follow_events(self) -> AsyncIterator[dict[str, Any]]:
        """Every event from the first step of the iteration on."""
        ...

    def log_path(self, model: str) -> Path:
        """The log file of a model, of "supervisor" or "zygote"; it may not exist yet. Raises UnknownModel.

        Looks names up in its list and never builds a path from one it does not know.
        """
        ...


class ErrorCode(StrEnum):
    """`error.code` of an answer."""

    UNKNOWN_MODEL = "unknown_model"
    REFUSED = "refused"
    """The command makes no sense in the present state."""
    FORBIDDEN = "forbidden"
    """The caller's user may not use the socket."""
    CONFIG = "config"
    """The configuration was refused; nothing was changed."""
    FAILED = "failed"
    STOPPING = "stopping"
    """The daemon is on its way out."""
    INVALID = "invalid"
    NOT_FOUND = "not_found"
    METHOD = "method"
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    """The request did not arrive in time."""
    BUSY = "busy"
    """Too many connections."""
    INTERNAL = "internal"
    """A bug: the daemon's log has the stack trace."""


HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.UNKNOWN_MODEL: 404,
    ErrorCode.REFUSED: 409,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.CONFIG: 422,
    ErrorCode.FAILED: 500,
    ErrorCode.STOPPING: 503,
    ErrorCode.INVALID: 400,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.METHOD: 405,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.TIMEOUT: 408,
    ErrorCode.BUSY: 503,
    ErrorCode.INTERNAL: 500,
}

EXIT_CODES: dict[str, CtlExit] = {
    ErrorCode.UNKNOWN_MODEL: CtlExit.UNKNOWN_MODEL,
    ErrorCode.REFUSED: CtlExit.REFUSED,
    ErrorCode.FORBIDDEN: CtlExit.REFUSED,
}
"""What citadelctl exits with; every other code is `CtlExit.FAILED`."""


def error_body(code: ErrorCode, message: str, **more: list[str]) -> dict[str, Any]:
    """The JSON body of an error answer."""
    return {"error": {"message": message, "code": str(code), **more}}


def describe(error: CitadelError) -> tuple[ErrorCode, dict[str, Any]]:
    """The code and the JSON body that tell `error` to a client."""
    match error:
        case UnknownModel():
            return ErrorCode.UNKNOWN_MODEL, error_body(ErrorCode.UNKNOWN_MODEL, str(error), known=error.known)
        case CommandRefused():
            return ErrorCode.REFUSED, error_body(ErrorCode.REFUSED, str(error))
        case ConfigError():
            return ErrorCode.CONFIG, error_body(ErrorCode.CONFIG, str(error), problems=error.problems)
        case _:
            return ErrorCode.FAILED, error_body(ErrorCode.FAILED, str(error))
