"""The client: every way to fail becomes one line and an exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from citadel_supervisor.control.client import ControlClient
from citadel_supervisor.control.server import bind_control_socket
from citadel_supervisor.errors import CommandRefused, ConfigError, ControlError, CtlExit, DaemonUnreachable
from citadel_supervisor.events import Notice
from tests.control.fake_api import Hosted, fake_model


@pytest.fixture
def client(host: Hosted) -> Iterator[ControlClient]:
    with ControlClient(host.socket) as one:
        yield one


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Something that takes a request, says `answer` and dies."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            asked = b""
            while not asked:  # the client first looks whether anybody is there
                connection, _ = listener.accept()
                with connection:
                    asked = connection.recv(65536)
                    if asked:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(30)


def failure_of(path: Path, timeout_s: float = 30) -> ControlError:
    with ControlClient(path, timeout_s) as client, pytest.raises(ControlError) as caught:
        client.status()
    return caught.value


def test_the_calls_return_what_the_daemon_answers(host: Hosted, client: ControlClient) -> None:
    assert client.status() == host.api.status()
    assert client.version()["pid"] == os.getpid()
    assert client.model("phi-3-mini") == fake_model("phi-3-mini", 11403)
    assert client.stop("phi-3-mini", drain_s=1.5)["state"] == "stopped"
    assert client.start("phi-3-mini", wait=False)["id"] == "phi-3-mini"
    assert client.drain("phi-3-mini")["state"] == "draining"
    assert client.restart("phi-3-mini", drain_s=0)["state"] == "ready"
    assert client.reload()["restart_needed"] == ["gateway"]
    assert host.api.calls == [
        ("stop", "phi-3-mini", True, 1.5),
        ("start", "phi-3-mini", False),
        ("drain", "phi-3-mini", True),
        ("restart", "phi-3-mini", True, 0.0),
        ("reload",),
    ]


def test_events_and_logs_stream(host: Hosted, client: ControlClient) -> None:
    host.do(lambda: host.api.bus.publish(Notice(level="INFO", text="one")))
    assert [event["text"] for event in client.events()] == ["one"]
    following = client.events(follow=True)
    assert next(following)["text"] == "one"
    host.do(lambda: host.api.bus.publish(Notice(level="INFO", text="two")))
    assert next(following)["text"] == "two"

    (host.socket.parent / "zygote.log").write_text("a\nb\nc\n")
    assert b"".join(client.logs("zygote", lines=2)) == b"b\nc\n"


@pytest.mark.parametrize("model", ["gpt-5", "", "a/b", "..", "../../etc/passwd"])
def test_an_unknown_model_has_its_exit_code(client: ControlClient, model: str) -> None:
    for call in (client.model, client.start, client.stop, lambda one: list(client.logs(one, lines=1))):
        with pytest.raises(ControlError) as caught:
            call(model)
        assert caught.value.code is CtlExit.UNKNOWN_MODEL


def test_refusals_and_bad_configurations_have_theirs(host: Hosted, client: ControlClient) -> None:
    host.api.refusals["start"] = CommandRefused("phi-3-mini is ready already")
    with pytest.raises(ControlError, match="is ready already") as caught:
        client.start("phi-3-mini")
    assert caught.value.code is CtlExit.REFUSED
    host.api.refusals["reload"] = ConfigError("citadel.yaml", ["gatway: unknown; did you mean gateway?"])
    with pytest.raises(ControlError, match="did you mean gateway") as caught:
        client.reload()
    assert caught.value.code is CtlExit.FAILED


def test_a_command_that_takes_longer_than_allowed_times_out(host: Hosted, client: ControlClient) -> None:
    host.do(host.api.settle.clear)
    with pytest.raises(ControlError, match=r"within 0\.1 s") as caught:
        client.start("phi-3-mini", timeout_s=0.1)
    assert caught.value.code is CtlExit.TIMED_OUT


def test_no_socket(directory: Path) -> None:
    error = failure_of(directory / "control.sock")
    assert isinstance(error, DaemonUnreachable)
    assert "there is no such socket" in str(error)
    assert "systemctl start citadel-supervisor" in str(error)


def test_a_socket_that_a_dead_daemon_left(directory: Path) -> None:
    bind_control_socket(directory / "control.sock").close()
    error = failure_of(directory / "control.sock")
    assert isinstance(error, DaemonUnreachable)
    assert "dead daemon" in str(error)


def test_a_daemon_that_hangs(directory: Path) -> None:
    with bind_control_socket(directory / "control.sock"):  # accepts, never answers
        error = failure_of(directory / "control.sock", timeout_s=0.1)
    assert error.code is CtlExit.TIMED_OUT


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        (b"", CtlExit.UNREACHABLE, "ended before its answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", CtlExit.UNREACHABLE, "ended before its answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", CtlExit.UNREACHABLE, "ended before its answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", CtlExit.FAILED, "no citadel-supervisor"),
        (b"HTTP/1.1 502 Bad\r\ncontent-length: 2\r\n\r\nhi", CtlExit.FAILED, "answered 502"),
    ],
)
def test_a_daemon_that_dies_or_is_none(directory: Path, answer: bytes, code: CtlExit, text: str) -> None:
    path = directory / "control.sock"
    with answering(path, answer):
        error = failure_of(path)
    assert error.code is code
    assert text in str(error)


def test_a_daemon_that_dies_while_it_is_followed(directory: Path) -> None:
    path = directory / "control.sock"
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    line = b'{"kind":"notice"}\n'
    with answering(path, head + b"%x\r\n%s\r\n" % (len(line), line)):
        with ControlClient(path) as client:
            events = client.events(follow=True)
            assert next(events) == {"kind": "notice"}
            with pytest.raises(DaemonUnreachable):
                next(events)


AS_NOBODY = """
import os, sys
from pathlib import Path
from citadel_supervisor.control.client import ControlClient
from citadel_supervisor.errors import ControlError
client = ControlClient(Path(sys.argv[1]))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    client.status()
except ControlError as error:
    print(int(error.code), error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_user_without_the_right_is_told_how_to_get_it(host: Hosted, directory: Path) -> None:
    def as_nobody() -> str:
        command = [sys.executable, "-c", AS_NOBODY, str(host.socket)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert as_nobody().startswith("5 ")
    assert "its directory is closed to you" in as_nobody()
    directory.chmod(0o755)
    assert "run citadelctl with sudo" in as_nobody()
    os.chown(host.socket, -1, 2)
    assert "sudo usermod -aG bin $USER" in as_nobody()
