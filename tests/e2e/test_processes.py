"""The daemon's processes as the host sees them: names, cores, memory, and what they tell systemd."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from citadel_supervisor.workers.process import carries_mark
from tests.e2e.conftest import Measured
from tests.e2e.daemon import MODELS, Daemon, Status, write_config
from tests.e2e.datagrams import Notifications
from tests.e2e.load import load

pytestmark = [pytest.mark.timeout(300)]

MOST_DAEMON_BYTES = 80_000_000
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@pytest.mark.engine
async def test_every_process_says_which_model_and_part_it_is(demo: Daemon) -> None:
    status = await demo.ready()
    expected = {demo.pid: "citadel-supervisor", status["zygote"]["pid"]: "citadel: zygote"}
    for name, model in status["models"].items():
        generation = f"(generation {model['generation']})"
        expected[model["pid"]] = f"citadel: {name} API {generation}"
        expected[model["core_pid"]] = f"citadel: {name} engine core {generation}"
    assert demo.names() == expected, "these and no other"


@pytest.mark.engine
async def test_every_process_can_be_told_to_be_this_daemons(demo: Daemon) -> None:
    """By what a later daemon looks for, to end what this one might leave."""
    await demo.ready()
    for process in demo.tree():
        assert carries_mark(process.pid, demo.runtime) or process.pid == demo.pid, process


@pytest.mark.engine
async def test_engines_stay_on_their_cores(demo: Daemon) -> None:
    """Every thread of an engine core may run on its model's cores alone, and no more of them are busy."""
    status = await demo.ready()
    port = status["ports"]["router"]
    before = {name: _thread_seconds(status["models"][name]["core_pid"]) for name in MODELS}
    async with load(port) as requests:
        for outcome in [requests.plain(name, 24) for name in MODELS]:
            assert (await outcome.end()).whole
    for name in MODELS:
        model = status["models"][name]
        masks = _masks(model["core_pid"])
        assert len(masks) > 1
        assert set(masks.values()) == {frozenset(model["cpus"])}, name
        used = {
            thread: seconds - before[name].get(thread, 0.0)
            for thread, seconds in _thread_seconds(model["core_pid"]).items()
        }
        most = max(used.values())
        assert most > 0
        busy = [thread for thread, seconds in used.items() if seconds > most / 5]
        assert len(busy) <= len(model["cpus"]), "more computing threads than cores"


def _masks(pid: int) -> dict[str, frozenset[int]]:
    """The cores that each thread may run on."""
    found = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        listed = re.search(r"^Cpus_allowed_list:\s+(\S+)", (thread / "status").read_text(), re.MULTILINE)
        assert listed is not None
        cores: set[int] = set()
        for part in listed[1].split(","):
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1))
        found[thread.name] = frozenset(cores)
    return found


def _thread_seconds(pid: int) -> dict[str, float]:
    """CPU seconds of each thread so far."""
    found = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        fields = (thread / "stat").read_text().rpartition(") ")[2].split()
        found[thread.name] = (int(fields[11]) + int(fields[12])) * TICK_S
    return found


@pytest.mark.engine
async def test_the_daemon_stays_small(demo: Daemon, measured: Measured) -> None:
    """With four models ready, and after 200 requests."""
    status = await demo.ready()
    first = _resident(status)
    async with httpx.AsyncClient(timeout=120) as http:
        limit = asyncio.Semaphore(8)

        async def ask(number: int) -> int:
            name = MODELS[number % len(MODELS)]
            body = {"prompt": f"{number} is", "max_tokens": 2, "stream": number % 3 == 0}
            async with limit:
                url = f"http://127.0.0.1:{status['models'][name]['port']}/v1/completions"
                return (await http.post(url, json=body)).status_code

        assert set(await asyncio.gather(*map(ask, range(200)))) == {200}
    after = _resident(await demo.status())
    measured.tell(
        f"the daemon has {first / 1e6:.1f} MB with four models ready, {after / 1e6:.1f} after 200 requests"
    )
    assert max(first, after) < MOST_DAEMON_BYTES


def _resident(status: Status) -> int:
    """The daemon's resident memory, which its status must tell truly."""
    real = int(psutil.Process(status["pid"]).memory_info().rss)
    assert abs(real - status["memory_bytes"]) < 8e6
    return real


@pytest.mark.engine
async def test_the_daemon_has_no_engine_in_it(demo: Daemon) -> None:
    status = await demo.ready()
    engine = re.compile(r"/(torch|vllm|transformers|numpy)[/.]")
    assert not engine.search(_mapped(demo.pid))
    assert engine.search(_mapped(status["zygote"]["pid"])), "where it is, it is found"


def _mapped(pid: int) -> str:
    """The files in a process's memory."""
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notifications]:
    notifications = Notifications(tmp_path_factory.mktemp("n") / "notify")
    yield notifications
    notifications.close()


async def test_what_systemd_is_told(
    make_daemon: Callable[..., Daemon], fake_engine: Path, systemd: Notifications
) -> None:
    """Ready once every model is ready or can never be; how it goes before, a beating heart, and the end."""

    def write(place: Path) -> Path:
        (place / "checkpoint").mkdir()
        os.mkfifo(place / "gate")
        model = {"checkpoint": str(place / "checkpoint"), "python": str(fake_engine)}
        return write_config(
            place,
            {
                "alpha": model,
                "bad": model | {"env": {"FAKE_FATAL": "no such weights"}},
                "gated": model | {"env": {"FAKE_GATE": str(place / "gate")}},
                "off": model | {"enabled": False},
            },
        )

    daemon = make_daemon(write, NOTIFY_SOCKET=str(systemd.address), WATCHDOG_USEC="400000")
    daemon.start()
    await systemd.until("STATUS=")
    await daemon.until(
        lambda status: (
            [status["models"][name]["state"] for name in ("alpha", "bad", "gated", "off")]
            == ["ready", "quarantined", "loading", "stopped"]
        )
    )
    await systemd.until("STATUS=alpha ready")
    await systemd.count("WATCHDOG=1", 5)
    assert not any(message.startswith("READY") for message in systemd.seen), "a model is still loading"
    await systemd.until("EXTEND_TIMEOUT_USEC=")

    with (daemon.place / "gate").open("wb", buffering=0) as gate:
        gate.write(b"." * 20)
        ready = await systemd.until("READY=1")
        status = await daemon.status()
    assert status["models"]["gated"]["state"] == "ready"
    told = [message for message in systemd.seen[:ready] if message.startswith("STATUS=")]
    assert any("gated loading" in message for message in told)
    assert any("bad quarantined" in message for message in told)
    await systemd.until("STATUS=2 of 4 models ready")
    assert "no such weights" in daemon.output()

    daemon.signal(signal.SIGTERM)
    await systemd.until("STOPPING=1")
    assert await daemon.exit_code() == 0
    assert systemd.seen.count("READY=1") == 1
