"""The socket: who may connect, how it is made and replaced, and what a hostile client achieves."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import select
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import uvloop

from citadel_supervisor.control import server as server_module
from citadel_supervisor.control.peers import Gate, Peer
from citadel_supervisor.control.server import ControlServer, bind_control_socket
from citadel_supervisor.errors import AlreadyRunning, ConfigError, StartError
from tests.control.fake_api import FakeSupervisor, Hosted, hosted

NOBODY = 65_534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
STATUS = b"GET /v1/status HTTP/1.1\r\nhost: citadel\r\n\r\n"


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(path))
    return sock


def answer(sock: socket.socket) -> bytes:
    """All that comes until the server closes, be it with a reset."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def one_answer(sock: socket.socket) -> bytes:
    """The next whole answer of a connection that stays open."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += sock.recv(65536)
    head, _, body = raw.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body


def closed(sock: socket.socket) -> bool:
    """Wait until the server has closed, not only ended its side."""
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return bool(poll.poll(30_000))


def status_code(path: Path) -> int:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://citadel") as client:
        return client.get("/v1/status", timeout=30).status_code


def error_of(raw: bytes) -> tuple[int, str]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


# Who may connect.


def test_the_gate_admits_root_the_daemon_and_the_group() -> None:
    gate = Gate(uid=1000, group="citadel", gid=77)
    assert gate.admits(Peer(uid=0, pid=1))
    assert gate.admits(Peer(uid=1000, pid=1))
    assert gate.admits(Peer(uid=1001, pid=1, groups=frozenset({5, 77})))
    assert not gate.admits(Peer(uid=1001, pid=1, groups=frozenset({5})))
    assert "usermod -aG citadel" in gate.refusal(Peer(uid=1001, pid=1))
    assert not Gate(uid=1000).admits(Peer(uid=1001, pid=1, groups=frozenset({0})))


def test_a_group_this_host_does_not_have_is_a_configuration_error(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"control\.group: .*groupadd -r no-such-group"):
        bind_control_socket(directory / "control.sock", "no-such-group")
    assert not (directory / "control.sock").exists()


def test_a_refused_peer_reads_why_and_is_cut_off(host: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "admits", lambda self, peer: False)
    with connect(host.socket) as sock:
        sock.sendall(STATUS)
        code, name = error_of(answer(sock))
    assert (code, name) == (403, "forbidden")


def test_strangers_take_no_places(host: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(server_module, "_LINGER_S", 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(Gate, "admits", lambda self, peer: False)
        strangers = [connect(host.socket) for _ in range(8)]
        for sock in strangers:
            assert b"403" in sock.recv(65536)
        assert closed(strangers[-1])  # no place to linger in either
    assert status_code(host.socket) == 200
    for sock in strangers:
        sock.close()


AS_SOMEONE = """
import os, socket, sys
path, uid, groups = sys.argv[1], int(sys.argv[2]), [int(g) for g in sys.argv[3].split(",") if g]
os.setgroups(groups); os.setgid(uid); os.setuid(uid)
sock = socket.socket(socket.AF_UNIX); sock.settimeout(30)
try:
    sock.connect(path)
except PermissionError:
    sys.exit("permission denied")
sock.sendall(b"GET /v1/status HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n")
print(sock.recv(65536).split()[1].decode())
"""


def as_someone(path: Path, uid: int, groups: str = "") -> str:
    command = [sys.executable, "-c", AS_SOMEONE, str(path), str(uid), groups]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return (done.stdout or done.stderr).strip()


@AS_ROOT
def test_another_user_is_refused_even_where_the_files_let_it_through(host: Hosted, directory: Path) -> None:
    directory.chmod(0o755)
    assert as_someone(host.socket, NOBODY) == "permission denied"  # by the mode
    host.socket.chmod(0o666)
    assert as_someone(host.socket, NOBODY) == "403"  # by the peer check


@AS_ROOT
def test_members_of_the_group_are_admitted(directory: Path) -> None:
    directory.chmod(0o755)
    group = next(one for one in grp.getgrall() if one.gr_gid not in (0, NOBODY))
    with hosted(directory, group.gr_name) as host:
        assert host.socket.stat().st_gid == group.gr_gid
        assert as_someone(host.socket, NOBODY, str(group.gr_gid)) == "200"
        assert as_someone(host.socket, NOBODY) == "permission denied"
        host.socket.chmod(0o666)
        assert as_someone(host.socket, NOBODY) == "403"


# How the socket is made.


def test_the_socket_has_mode_0660_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0)
    try:
        path = directory / "run" / "control.sock"
        with bind_control_socket(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    finally:
        os.umask(before)


def test_a_dead_daemons_socket_is_replaced(directory: Path) -> None:
    path = directory / "control.sock"
    bind_control_socket(path).close()  # closed, but its file stays, as after kill -9
    assert path.exists()
    with bind_control_socket(path), connect(path):
        pass


def test_a_live_daemons_socket_is_not(directory: Path) -> None:
    path = directory / "control.sock"
    with bind_control_socket(path):
        with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()}\b"):
            bind_control_socket(path)
        with connect(path):
            pass


def test_a_file_that_is_no_socket_is_left_alone(directory: Path) -> None:
    path = directory / "control.sock"
    path.write_text("precious")
    with pytest.raises(StartError, match="something else is there"):
        bind_control_socket(path)
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_says_so(directory: Path) -> None:
    with pytest.raises(StartError, match="at most 107 bytes"):
        bind_control_socket(directory / ("x" * 100) / "control.sock")


def test_a_directory_that_cannot_be_made_is_a_start_error(directory: Path) -> None:
    (directory / "file").write_text("")
    with pytest.raises(StartError, match=r"control\.sock"):
        bind_control_socket(directory / "file" / "control.sock")


async def test_stop_leaves_a_successors_socket_in_place(directory: Path) -> None:
    path = directory / "control.sock"
    api = FakeSupervisor(directory)
    server = ControlServer(
        api, bind_control_socket(path), gate=Gate.for_group(None), publish=api.bus.publish, grace_s=1
    )
    await server.start()
    path.unlink()
    with bind_control_socket(path):
        await server.stop()
        assert path.exists()


async def test_stop_before_start_only_cleans_up(directory: Path) -> None:
    path = directory / "control.sock"
    api = FakeSupervisor(directory)
    server = ControlServer(api, bind_control_socket(path), gate=Gate.for_group(None), publish=api.bus.publish)
    await server.stop()
    assert not path.exists()


def test_it_serves_under_uvloop(directory: Path) -> None:
    async def serve() -> int:
        path = directory / "control.sock"
        api = FakeSupervisor(directory)
        gate = Gate.for_group(None)
        server = ControlServer(api, bind_control_socket(path), gate=gate, publish=api.bus.publish)
        await server.start()
        try:
            return await asyncio.to_thread(status_code, path)
        finally:
            await server.stop()

    assert uvloop.run(serve()) == 200


# What a hostile client achieves.


def test_garbage_is_400_and_fills_no_log(host: Hosted, caplog: pytest.LogCaptureFixture) -> None:
    with connect(host.socket) as sock:
        sock.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert answer(sock).startswith(b"HTTP/1.1 400 ")
    assert status_code(host.socket) == 200
    assert caplog.text == ""


@pytest.mark.parametrize(
    "begin",
    [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\n", b"\r\n"],
    ids=["url", "header value", "headers", "empty lines"],
)
def test_an_endless_head_is_cut_off_and_not_collected(host: Hosted, begin: bytes) -> None:
    unit = {b"GET / HTTP/1.1\r\n": b"a: b\r\n", b"\r\n": b"\r\n"}.get(begin, b"aaaaaa")
    with connect(host.socket) as sock:
        sock.sendall(begin)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100_000):
                sock.sendall(unit * 1000)
        assert error_of(answer(sock)) == (431, "too_large")
    assert status_code(host.socket) == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_and_the_connection_ends(host: Hosted, chunked: bool) -> None:
    size = 10_000_000
    length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % size
    with connect(host.socket) as sock:
        sock.sendall(b"POST /v1/models/phi-3-mini/stop HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n\r\n")
        try:
            if chunked:
                sock.sendall(b"%x\r\n" % size)
            sock.sendall(b" " * size)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert error_of(answer(sock)) == (413, "too_large")
    assert host.api.calls == []


def test_a_body_nobody_asked_for_does_not_go_on_for_ever(host: Hosted) -> None:
    with connect(host.socket) as sock:
        sock.sendall(b"GET /v1/status HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1_000):
                sock.sendall(b"x" * 65536)


def test_the_limits_are_for_each_request_of_a_connection(host: Hosted) -> None:
    body = b" " * 60_000 + b"{}"
    head = b"POST /v1/models/phi-3-mini/stop HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with connect(host.socket) as sock:
        for _ in range(20):
            sock.sendall(head + body)
            assert one_answer(sock).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"GET /" + b"a" * 100_000)
        assert error_of(answer(sock)) == (431, "too_large")


def test_a_slow_head_is_timed_out(host: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HEAD_DEADLINE_S", 0.05)
    with connect(host.socket) as sock:
        sock.sendall(STATUS[:10])
        assert error_of(answer(sock)) == (408, "timeout")
    with connect(host.socket) as sock:  # and so is one that says nothing at all
        assert error_of(answer(sock)) == (408, "timeout")


def test_a_slow_second_head_is_timed_out_too(host: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(host.socket) as sock:
        sock.sendall(STATUS)
        assert one_answer(sock).startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(server_module, "_HEAD_DEADLINE_S", 0.05)
        sock.sendall(STATUS[:10])
        assert error_of(answer(sock)) == (408, "timeout")


def test_one_connection_too_many_is_told_so_and_a_place_comes_free(
    host: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 3)
    held = [connect(host.socket) for _ in range(3)]
    for sock in held:
        sock.sendall(STATUS)
        assert one_answer(sock).startswith(b"HTTP/1.1 200 ")
    with connect(host.socket) as extra:
        extra.sendall(STATUS)
        assert error_of(answer(extra)) == (503, "busy")
    for sock in held:
        sock.shutdown(socket.SHUT_WR)
        assert answer(sock) == b""  # closed by the server, so the place is free
        sock.close()
    assert status_code(host.socket) == 200


def test_pipelined_requests_are_answered_in_order(host: Hosted) -> None:
    with connect(host.socket) as sock:
        last = STATUS.replace(b"status", b"version").replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        sock.sendall(STATUS * 10 + last)
        raw = answer(sock)
    assert raw.count(b"HTTP/1.1 200 OK") == 11
    assert raw.endswith(b"}") and b'"api":"v1"' in raw[-80:]


def test_requests_far_ahead_of_their_answers_are_not_collected(host: Hosted) -> None:
    with connect(host.socket) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(STATUS * 1000)
        raw = answer(sock)
    assert b"HTTP/1.1 400 " in raw
    assert raw.count(b"HTTP/1.1 200 OK") <= server_module.MAX_PIPELINED
