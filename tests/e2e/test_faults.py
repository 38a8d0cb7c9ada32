"""Processes of a worker, and the zygote, killed or stopped under load: what clients and operators notice."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass

import psutil
import pytest

from citadel_supervisor.workers.process import process_table
from tests.e2e.conftest import Measured
from tests.e2e.daemon import Daemon, Status
from tests.e2e.load import Outcome, load

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@dataclass(frozen=True, slots=True)
class Fault:
    """A signal to one process of a model's worker, and what the supervisor must say of it."""

    victim: str
    process: str
    signal: signal.Signals
    reason: str
    bystander: str = "phi-3-mini"


FAULTS = {
    "engine core killed": Fault(
        "mixtral-8x7b", "core_pid", signal.SIGKILL, r"engine core \(pid {pid}\) killed by SIGKILL"
    ),
    "API process killed": Fault("hermes-2", "pid", signal.SIGKILL, r"API \(pid {pid}\) killed by SIGKILL"),
    "engine core stopped": Fault(
        "openchat-3.5", "core_pid", signal.SIGSTOP, "hung: .*(stopped by a signal|no token and no CPU)"
    ),
    "API process stopped": Fault(
        "hermes-2", "pid", signal.SIGSTOP, "hung: the API process has been stopped by a signal"
    ),
}


@dataclass(slots=True)
class Requests:
    """What runs at the moment of the fault, on its victim and on another model."""

    streams: list[Outcome]
    silent: list[Outcome]
    others: list[Outcome]


@pytest.mark.parametrize("name", FAULTS)
async def test_a_worker_is_lost_under_load(demo: Daemon, name: str, measured: Measured) -> None:
    fault = FAULTS[name]
    before = await demo.ready()
    victim = before["models"][fault.victim]
    own, other = victim["port"], before["models"][fault.bystander]["port"]
    async with load(own) as requests, load(other) as elsewhere, load(before["ports"]["router"]) as routed:
        streams = [requests.stream(fault.victim, 1500) for _ in range(2)]
        others = [elsewhere.stream(fault.bystander, 60)]
        for stream in (*streams, *others):
            await stream.output()
        silent = [requests.plain(fault.victim, 24) for _ in range(2)]
        others.append(elsewhere.plain(fault.bystander, 24))
        await demo.until(lambda status: status["models"][fault.victim]["active_requests"] == 4)

        os.kill(victim[fault.process], fault.signal)
        at = time.monotonic()
        meanwhile = [requests.plain(fault.victim, 4)]
        await demo.until(lambda status: status["models"][fault.victim]["state"] != "ready")
        lost_after_s = time.monotonic() - at
        meanwhile += [requests.stream(fault.victim, 4), routed.plain(fault.victim, 4)]
        await _check(Requests(streams, silent + meanwhile, others), victim["generation"] + 1)

    measured.tell(
        f"{name}: noticed after {lost_after_s:.2f} s, the first good answer after "
        f"{min(one.ended for one in silent + meanwhile) - at:.2f} s, the last after "
        f"{max(one.ended for one in silent + meanwhile) - at:.2f} s"
    )
    await _check_status(demo, before, fault)


async def _check(requests: Requests, generation: int) -> None:
    for one in requests.silent:
        await one.end()
        assert one.error is None
        assert one.finish == "length"
        assert one.generation == generation, "answered by the new generation"
    for one in requests.streams:
        await one.end()
        # A clean event, which the client understands; not a broken connection.
        assert type(one.error).__name__ == "APIError", one.error
        assert "engine was lost" in str(one.error)
        assert one.generation == generation - 1
        assert one.chunks
    for one in requests.others:
        await one.end()
        assert one.whole, one.error


async def _check_status(demo: Daemon, before: Status, fault: Fault) -> None:
    after = await demo.ready()
    old, new = before["models"].pop(fault.victim), after["models"].pop(fault.victim)
    assert new["generation"] == old["generation"] + 1
    assert new["restarts"] == old["restarts"] + 1
    assert {new["pid"], new["core_pid"]}.isdisjoint({old["pid"], old["core_pid"]})
    left = [entry.pid for entry in process_table().values() if entry.session == old["pid"]]
    assert left == [], "something of the old tree is left"
    assert not psutil.pid_exists(old["core_pid"])
    await demo.until(lambda _: demo.zombies() == [], 10)
    assert not demo.engine_socket(fault.victim, old["generation"]).exists()
    assert not (demo.runtime / "workers" / f"{fault.victim}.{old['generation']}").exists()
    for model, was in before["models"].items():
        same = ("pid", "core_pid", "generation", "restarts", "state", "since")
        assert {key: after["models"][model][key] for key in same} == {key: was[key] for key in same}
    reasons = [
        event["reason"]
        for event in await demo.events()
        if event["kind"] == "transition"
        and (event["model"], event["generation"]) == (fault.victim, old["generation"])
        and event["after"] == "failed"
    ]
    assert len(reasons) == 1
    assert re.match(fault.reason.format(pid=old[fault.process]), reasons[0])


async def test_the_zygote_is_lost_under_load(demo: Daemon, measured: Measured) -> None:
    """Its workers do not notice; a new one is made, and workers can be restarted from it."""
    before = await demo.ready()
    models = ("openchat-3.5", "phi-3-mini")
    async with load(before["ports"]["router"]) as requests:
        streams = [requests.stream(model, 60) for model in models]
        for stream in streams:
            await stream.output()
        plain = [requests.plain(model, 24) for model in models]
        os.kill(before["zygote"]["pid"], signal.SIGKILL)
        at = time.monotonic()
        seen = await demo.until(lambda status: status["zygote"]["pid"] not in (None, before["zygote"]["pid"]))
        assert seen["models"].keys() == before["models"].keys()
        for outcome in streams + plain:
            await outcome.end()
            assert outcome.whole, outcome.error
    # Asked for while the new zygote still loads: it waits for it.
    assert (await demo.ctl("restart", "phi-3-mini")).code == 0
    after = await demo.ready()
    measured.tell(
        f"zygote killed: a worker restarted from the new one is ready after {time.monotonic() - at:.1f} s"
    )
    restarted, was = after["models"].pop("phi-3-mini"), before["models"].pop("phi-3-mini")
    assert restarted["launch"] == "zygote"
    assert restarted["generation"] == was["generation"] + 1
    assert restarted["restarts"] == was["restarts"], "asked for by an operator, so not counted as a loss"
    for model, was in before["models"].items():
        for key in ("pid", "core_pid", "generation", "since"):
            assert after["models"][model][key] == was[key]
    assert psutil.Process(after["zygote"]["pid"]).ppid() == demo.pid
