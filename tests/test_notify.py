from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from citadel_supervisor.notify import Notifier


@pytest.fixture
def systemd(run_dir: Path) -> Iterator[socket.socket]:
    """The other end, as systemd binds it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(run_dir / "notify"))
        manager.settimeout(5)
        yield manager


@pytest.fixture
def notifier(systemd: socket.socket) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": systemd.getsockname()})
    yield made
    made.close()


def test_the_life_of_a_service(notifier: Notifier, systemd: socket.socket) -> None:
    notifier.status("loading")
    notifier.extend(120)
    notifier.ready()
    notifier.reloading()
    notifier.stopping()
    assert [systemd.recv(4096) for _ in range(5)] == [
        b"STATUS=loading", b"EXTEND_TIMEOUT_USEC=120000000", b"READY=1", b"RELOADING=1", b"STOPPING=1",
    ]  # fmt: skip


def test_a_status_is_sent_only_when_it_changed(notifier: Notifier, systemd: socket.socket) -> None:
    for text in ("one", "one", "two", "one"):
        notifier.status(text)
    notifier.ready()
    assert [systemd.recv(4096) for _ in range(4)] == [b"STATUS=one", b"STATUS=two", b"STATUS=one", b"READY=1"]


def test_a_status_says_nothing_but_a_status(notifier: Notifier, systemd: socket.socket) -> None:
    notifier.status("phi is failed: line one\nREADY=1\nMAINPID=1")
    message = systemd.recv(4096)
    assert message.count(b"\n") == 0 and message.startswith(b"STATUS=phi is failed: line one")


def test_an_abstract_socket() -> None:
    name = f"citadel-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        notifier = Notifier({"NOTIFY_SOCKET": "@" + name})
        notifier.ready()
        assert manager.recv(100) == b"READY=1"
        notifier.close()


async def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier({})
    notifier.ready()
    notifier.status("x")
    await notifier.feed_watchdog()
    notifier.close()


def test_a_manager_that_is_gone_is_no_error(run_dir: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(run_dir / "nobody")})
    notifier.ready()
    notifier.close()


def test_a_manager_that_does_not_read_never_holds_up_the_daemon(
    notifier: Notifier, systemd: socket.socket
) -> None:
    for number in range(10):
        notifier.status(str(number))
    notifier.ready()
    for number in range(3000):  # far more than a socket takes in
        notifier.status(str(number))
    systemd.setblocking(False)
    seen: list[bytes] = []
    for _ in range(10):  # it reads again: what matters comes late, but it comes
        with contextlib.suppress(BlockingIOError):
            while True:
                seen.append(systemd.recv(100))
        notifier.status(f"status {len(seen)}")
    assert b"READY=1" in seen


@pytest.mark.parametrize(
    ("environment", "fed"),
    [
        ({"WATCHDOG_USEC": "20000"}, True),
        ({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}, True),
        ({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
        ({"WATCHDOG_USEC": "0"}, False),
        ({}, False),
    ],
)
async def test_the_watchdog_is_fed_where_there_is_one_for_us(
    systemd: socket.socket, environment: dict[str, str], fed: bool
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname(), **environment})
    feeding = asyncio.create_task(notifier.feed_watchdog())
    if fed:
        messages = [await asyncio.to_thread(systemd.recv, 100) for _ in range(3)]
        assert messages == [b"WATCHDOG=1"] * 3
        assert not feeding.done()
        feeding.cancel()
    await asyncio.wait([feeding], timeout=5)
    assert feeding.done()
    notifier.close()
