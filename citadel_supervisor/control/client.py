"""The client of the control socket, as citadelctl uses it. Blocking; one object may serve many threads."""

from __future__ import annotations

import grp
import json
import pwd
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar
from urllib.parse import quote

import httpx

from citadel_supervisor.control.protocol import API, BASE_URL, EXIT_CODES
from citadel_supervisor.errors import ControlError, CtlExit, DaemonUnreachable

_CONNECT_S = 5.0

PartT = TypeVar("PartT")


class ControlClient:
    """Talks to the daemon behind the socket at `path`.

    Every call raises ControlError with the exit code that tells the failure: DaemonUnreachable, or
    UNKNOWN_MODEL, REFUSED, TIMED_OUT, FAILED. `timeout_s` bounds calls that answer at once; those that
    wait for a worker take a `timeout_s` of their own, None for as long as it takes.
    """

    def __init__(self, path: Path, timeout_s: float = 10.0) -> None:
        self.socket = path
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            # verify=False spares reading a bundle of certificates that a unix socket has no use for.
            transport=httpx.HTTPTransport(uds=str(path), verify=False),
            base_url=f"{BASE_URL}/{API}",
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def version(self) -> dict[str, Any]:
        return self._call("GET", "/version", self._timeout_s)

    def status(self) -> dict[str, Any]:
        return self._call("GET", "/status", self._timeout_s)

    def model(self, model: str) -> dict[str, Any]:
        """One model's part of the status."""
        return self._call("GET", self._path(model), self._timeout_s)

    def start(self, model: str, *, wait: bool = True, timeout_s: float | None = None) -> dict[str, Any]:
        """The model's status when it has settled or, without `wait`, at once; so do the other three."""
        return self._command(model, "start", {"wait": wait}, timeout_s)

    def stop(
        self, model: str, *, wait: bool = True, drain_s: float | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        return self._command(model, "stop", {"wait": wait, "drain_s": drain_s}, timeout_s)

    def restart(
        self, model: str, *, wait: bool = True, drain_s: float | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        return self._command(model, "restart", {"wait": wait, "drain_s": drain_s}, timeout_s)

    def drain(self, model: str, *, wait: bool = True, timeout_s: float | None = None) -> dict[str, Any]:
        return self._command(model, "drain", {"wait": wait}, timeout_s)

    def reload(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        return self._call("POST", "/reload", timeout_s)

    def events(self, *, follow: bool = False) -> Iterator[dict[str, Any]]:
        """The kept events, then with `follow` those to come, until the daemon ends."""
        with self._stream("/events", {"follow": int(follow)}, follow) as response:
            for line in self._received(response.iter_lines()):
                yield json.loads(line)

    def logs(self, model: str, *, lines: int, follow: bool = False) -> Iterator[bytes]:
        """The last `lines` lines of a log as they are, then with `follow` what is appended."""
        path = self._path(model, "logs")
        with self._stream(path, {"lines": lines, "follow": int(follow)}, follow) as response:
            yield from self._received(response.iter_raw())

    @staticmethod
    def _path(model: str, collection: str = "models") -> str:
        if model in ("", ".", "..") or "/" in model:  # would be another path, and no model is called so
            raise ControlError(f"model '{model}' does not exist", CtlExit.UNKNOWN_MODEL)
        return f"/{collection}/{quote(model, safe='')}"

    def _command(
        self, model: str, action: str, body: dict[str, Any], timeout_s: float | None
    ) -> dict[str, Any]:
        return self._call("POST", f"{self._path(model)}/{action}", timeout_s, body)

    def _call(
        self, method: str, path: str, timeout_s: float | None, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        timeout = httpx.Timeout(timeout_s, connect=_connect_s(timeout_s))
        self._knock()
        with self._translated(timeout_s):
            response = self._http.request(method, path, json=body, timeout=timeout)
            if response.is_error:
                _raise_for(response)
            answer: dict[str, Any] = response.json()
            return answer

    @contextmanager
    def _stream(self, path: str, query: dict[str, int], follow: bool) -> Iterator[httpx.Response]:
        read = None if follow else self._timeout_s
        timeout = httpx.Timeout(read, connect=_connect_s(self._timeout_s))
        request = self._http.build_request("GET", path, params=query, timeout=timeout)
        self._knock()
        with self._translated(self._timeout_s):
            response = self._http.send(request, stream=True)
        try:
            if response.is_error:
                with self._translated(self._timeout_s):
                    response.read()
                _raise_for(response)
            yield response
        finally:
            response.close()

    def _received(self, parts: Iterator[PartT]) -> Iterator[PartT]:
        """`parts`, with the failures of their arrival translated, but none of whoever consumes them."""
        while True:
            with self._translated(self._timeout_s):
                try:
                    part = next(parts)
                except StopIteration:
                    return
            yield part

    @contextmanager
    def _translated(self, timeout_s: float | None) -> Iterator[None]:
        """httpx's errors and a daemon's nonsense as ControlError."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise ControlError(
                f"the supervisor on {self.socket} did not answer within {timeout_s or _CONNECT_S:g} s",
                CtlExit.TIMED_OUT,
            ) from error
        except httpx.TransportError as error:
            raise DaemonUnreachable(str(self.socket), "it ended before its answer did") from error
        except (httpx.HTTPError, ValueError) as error:
            raise ControlError(f"what answers on {self.socket} is no citadel-supervisor: {error}") from error

    def _knock(self) -> None:
        """Raise what is wrong with the socket before httpx finds out: it would bury the errno and leak.

        (httpcore 1.0.9 does not close a unix socket that could not be connected.)
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_S)
            try:
                probe.connect(str(self.socket))
            except FileNotFoundError:
                raise DaemonUnreachable(str(self.socket), "there is no such socket") from None
            except ConnectionRefusedError:
                raise DaemonUnreachable(str(self.socket), "a dead daemon left it behind") from None
            except PermissionError:
                raise ControlError(self._not_permitted(), CtlExit.REFUSED) from None
            except (BlockingIOError, TimeoutError):
                text = f"the supervisor on {self.socket} accepts no connections; it may hang or be overloaded"
                raise ControlError(text, CtlExit.TIMED_OUT) from None
            except OSError as error:  # no socket, or its path is too long
                raise DaemonUnreachable(str(self.socket), error.strerror or str(error)) from None

    def _not_permitted(self) -> str:
        """Who may use the socket, as far as the caller is allowed to know."""
        try:
            info = self.socket.stat()
        except OSError:
            return f"you may not use {self.socket}: its directory is closed to you; run citadelctl with sudo"
        owner, group = _name(pwd.getpwuid, info.st_uid), _name(grp.getgrgid, info.st_gid)
        if info.st_gid == 0:
            return f"you may not use {self.socket}: it is user {owner}'s; run citadelctl with sudo"
        return (
            f"you may not use {self.socket}: it is for user {owner} and group {group}; join with "
            f"'sudo usermod -aG {group} $USER' and log in again, or run citadelctl with sudo"
        )


def _connect_s(timeout_s: float | None) -> float:
    return _CONNECT_S if timeout_s is None else min(_CONNECT_S, timeout_s)


def _name(look_up: Callable[[int], Sequence[Any]], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


def _raise_for(response: httpx.Response) -> NoReturn:
    """Raise the ControlError that an error answer tells."""
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), str(error["code"])
    except (ValueError, KeyError, TypeError):
        raise ControlError(f"the supervisor answered {response.status_code} without saying why") from None
    raise ControlError(message, EXIT_CODES.get(code, CtlExit.FAILED))
