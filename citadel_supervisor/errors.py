"""Every error this package raises on purpose, in one tree.

    CitadelError
    +-- ConfigError            the configuration is wrong; names the path and what to do
    +-- StartError             the daemon cannot start (not the configuration's fault)
    |   +-- PortTaken          a port is held by another process; names the holder
    |   +-- AlreadyRunning     another supervisor owns the runtime directory
    +-- WorkerError            something about one worker
    |   +-- NotReady           no generation can take the request now (503, Retry-After)
    |   +-- LaunchError        a process could not be made
    |   +-- CannotEverStart    no restart will help (bad checkpoint, bad arguments)
    |   +-- VerifyError        the known-answer check failed
    |   +-- CommandRefused     an operator's command makes no sense in this state
    +-- UnknownModel           no model or alias of that name
    +-- CheckpointError        a checkpoint is missing, incomplete or damaged
    +-- RequestError           a client's request is not served, on the client's account
    |   +-- BadRequest         it makes no sense (400)
    |   +-- BodyTooLarge       its body exceeds the limit (413)
    |   +-- ClientGone         the client left before its answer; nobody is left to tell
    +-- UpstreamError          the worker's side of a relayed request failed
    |   +-- UpstreamLost       the connection ended before the answer did
    |   +-- UpstreamRefused    no connection could be made
    +-- ControlError           citadelctl could not do what was asked
        +-- DaemonUnreachable  nobody answers on the control socket

Exit codes of `citadel-supervisor` (after sysexits.h) and of a worker process are in `DaemonExit`
and `WorkerExit`; those of `citadelctl` in `CtlExit`. Messages are one line, say what is wrong and
what to do, and are safe to show: no secrets, no stack traces.
"""

from __future__ import annotations

from enum import IntEnum


class DaemonExit(IntEnum):
    """Exit codes of `citadel-supervisor`."""

    OK = 0
    UNEXPECTED = 1
    """A bug: the log has the stack trace."""
    USAGE = 2
    PORT_TAKEN = 71
    """EX_OSERR: a port or the runtime directory belongs to another process."""
    CONFIG = 78
    """EX_CONFIG: the configuration was refused; systemd does not restart on it."""


class WorkerExit(IntEnum):
    """Exit codes that a worker process uses on purpose."""

    OK = 0
    ENGINE_DIED = 70
    """EX_SOFTWARE: the engine core is gone or reported an error; a restart may help."""
    ORPHANED = 75
    """EX_TEMPFAIL: the supervisor was gone before the worker began."""
    CANNOT_EVER_START = 78
    """EX_CONFIG: no restart will help; the worker is quarantined."""


class CtlExit(IntEnum):
    """Exit codes of `citadelctl`."""

    OK = 0
    FAILED = 1
    """The daemon tried and it did not work, for instance a model was quarantined."""
    USAGE = 2
    UNREACHABLE = 3
    """No daemon answers on the control socket."""
    UNKNOWN_MODEL = 4
    REFUSED = 5
    """Not permitted, or the command makes no sense in the present state."""
    TIMED_OUT = 6


class CitadelError(Exception):
    """Root of the tree."""


class ConfigError(CitadelError):
    """The configuration is wrong. `problems` holds one line a problem, each with its path."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        many = f"{len(problems)} problems" if len(problems) != 1 else "1 problem"
        super().__init__(f"{source}: {many}: " + "; ".join(problems))


class StartError(CitadelError):
    """The daemon cannot start."""


class PortTaken(StartError):
    """`address` is held by `holder` (a description such as "pid 12 (nginx)")."""

    def __init__(self, address: str, purpose: str, holder: str) -> None:
        self.address = address
        self.holder = holder
        super().__init__(
            f"cannot bind {address} for {purpose}: it is held by {holder}; stop it or change the port"
        )


class AlreadyRunning(StartError):
    """Another supervisor holds the lock on the runtime directory."""

    def __init__(self, runtime_dir: str, pid: str) -> None:
        super().__init__(
            f"another citadel-supervisor (pid {pid}) already runs with {runtime_dir}; "
            "stop it, or give this one a runtime_dir of its own"
        )


class WorkerError(CitadelError):
    """Something about one worker."""


class NotReady(WorkerError):
    """No generation of `model` takes requests now. `retry_after_s` is an honest guess, in seconds."""

    def __init__(self, model: str, state: str, reason: str, retry_after_s: float) -> None:
        self.model = model
        self.state = state
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(f"model '{model}' is {state}" + (f": {reason}" if reason else ""))


class LaunchError(WorkerError):
    """A worker process could not be made; a later try may succeed."""


class CannotEverStart(WorkerError):
    """No restart will help: quarantine at once."""


class VerifyError(WorkerError):
    """The known-answer check failed: the engine runs but does not compute what it should."""


class CommandRefused(WorkerError):
    """An operator's command makes no sense in the worker's present state."""


class UnknownModel(CitadelError):
    """No model or alias of that name; `known` are the names that exist."""

    def __init__(self, name: str, known: list[str]) -> None:
        self.name = name
        self.known = known
        super().__init__(f"model '{name}' does not exist; known: {', '.join(known)}")


class CheckpointError(CitadelError):
    """A checkpoint is missing, incomplete or damaged."""


class RequestError(CitadelError):
    """A client's request is not served, on the client's account."""


class BadRequest(RequestError):
    """The request makes no sense; `param` names the field at fault, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class BodyTooLarge(RequestError):
    """The request's body exceeds `limit` bytes; what was read of it is dropped."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request's body is larger than the {limit} bytes allowed")


class ClientGone(RequestError):
    """The client left before its request was answered."""


class UpstreamError(CitadelError):
    """The worker's side of a relayed request failed."""


class UpstreamLost(UpstreamError):
    """The connection to the worker ended before the answer did."""


class UpstreamRefused(UpstreamError):
    """No connection to the worker could be made."""


class ControlError(CitadelError):
    """citadelctl could not do what was asked. `code` is the process's exit code."""

    def __init__(self, message: str, code: CtlExit = CtlExit.FAILED) -> None:
        self.code = code
        super().__init__(message)


class DaemonUnreachable(ControlError):
    """Nobody answers on the control socket."""

    def __init__(self, socket: str, why: str) -> None:
        super().__init__(
            f"no citadel-supervisor answers on {socket} ({why}); is it running? "
            "Start it with 'systemctl start citadel-supervisor' or 'make run', "
            "or name its socket with --socket",
            CtlExit.UNREACHABLE,
        )
