"""Binding the ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import PortTaken, StartError
from citadel_supervisor.gateway.sockets import bind_all, port_number


def settings(host: str = "127.0.0.1", router: int = 0, metrics: int = 0, model: int = 0) -> Settings:
    gateway = {
        "host": host,
        "router_port": router,
        "metrics_port": metrics,
        "health_port": 0,
        "allow_without_keys": True,
    }
    models = {"alpha": {"port": model, "checkpoint": "/x"}, "beta": {"port": 0, "checkpoint": "/x"}}
    return Settings.model_validate({"state_dir": "/nonexistent", "gateway": gateway, "models": models})


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def test_every_port_is_bound_and_listens_before_anybody_serves() -> None:
    ports = bind_all(settings())
    try:
        numbers = [port_number(sock) for sock in ports]
        assert len(set(numbers)) == 5
        assert list(ports.models) == ["alpha", "beta"]
        for number in numbers:
            socket.create_connection(("127.0.0.1", number), timeout=5).close()
        assert not any(sock.get_inheritable() for sock in ports)
    finally:
        ports.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", numbers[0]), timeout=5)
    ports.close()


def test_configured_numbers_are_kept() -> None:
    wanted = free_port()
    ports = bind_all(settings(router=wanted))
    assert port_number(ports.router) == wanted
    ports.close()


def test_a_port_can_be_had_again_at_once_after_a_restart() -> None:
    wanted = free_port()
    ports = bind_all(settings(router=wanted))
    with socket.create_connection(("127.0.0.1", wanted), timeout=5) as client:
        ports.router.setblocking(True)
        served, _ = ports.router.accept()
        served.close()  # the side that closes first keeps the port busy for a minute
        assert client.recv(1) == b""
    ports.close()
    bind_all(settings(router=wanted)).close()


def test_the_holder_of_a_taken_port_is_named(taken: int) -> None:
    free = free_port()
    with pytest.raises(PortTaken) as caught:
        bind_all(settings(router=free, model=taken))
    message = str(caught.value)
    assert message.startswith(
        f"cannot bind 127.0.0.1:{taken} for model 'alpha': it is held by pid {os.getpid()} ("
    )
    assert "pytest" in message
    # What was bound before is free again.
    socket.create_server(("127.0.0.1", free)).close()


def test_another_process_is_named_too() -> None:
    code = (
        "import socket, sys\nsock = socket.create_server(('127.0.0.1', 0))\n"
        "print(sock.getsockname()[1], flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with pytest.raises(PortTaken) as caught:
            bind_all(settings(metrics=port))
        process.communicate("")
    assert f"for metrics: it is held by pid {process.pid} (" in str(caught.value)


def test_a_holder_that_cannot_be_seen_is_said_to_be(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(kind: str) -> Any:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", hidden)
    with pytest.raises(PortTaken, match=r"another process \(not visible to this user\)"):
        bind_all(settings(router=taken))


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours_is_refused_in_words(host: str) -> None:
    with pytest.raises(StartError, match=rf"cannot bind {host}:0 for the router: .+; check gateway.host"):
        bind_all(settings(host))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
def test_ipv6() -> None:
    ports = bind_all(settings("::1"))
    socket.create_connection(("::1", port_number(ports.router)), timeout=5).close()
    with pytest.raises(PortTaken, match=rf"\[::1\]:{port_number(ports.router)}"):
        bind_all(settings("::1", router=port_number(ports.router)))
    ports.close()
    everywhere = bind_all(settings("::"))
    socket.create_connection(("127.0.0.1", port_number(everywhere.router)), timeout=5).close()
    everywhere.close()
