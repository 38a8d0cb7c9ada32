"""citadelctl and the control socket on the real daemon: what they promise to operators and to programs."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from citadel_supervisor import __version__
from citadel_supervisor.errors import CtlExit
from tests.e2e.daemon import MODELS, PATIENCE_S, Daemon, Status
from tests.e2e.load import load

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MODEL = "phi-3-mini"
OTHERS = [model for model in MODELS if model != MODEL]


async def ask(port: int, **body: Any) -> httpx.Response:
    """A short completion."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        request = {"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0, **body}
        return await http.post(f"http://127.0.0.1:{port}/v1/completions", json=request)


def engines(status: Status, models: list[str]) -> list[tuple[Any, ...]]:
    """What tells whether these models have been touched."""
    keys = ("pid", "core_pid", "generation", "since")
    return [tuple(status["models"][model][key] for key in keys) for model in models]


async def test_status_for_programs(demo: Daemon) -> None:
    await demo.ready()
    ran = await demo.ctl("status", "--json")
    assert ran.code == CtlExit.OK
    status = ran.json()
    assert status["version"] == __version__
    assert status["uptime_s"] > 0
    assert status["ready"] is True
    assert list(status["models"]) == list(MODELS)
    for name, model in status["models"].items():
        assert model["state"] == "ready"
        assert "log-probabilities within" in model["reason"]
        assert 1024 < model["port"] < 65536
        assert psutil.Process(model["pid"]).ppid() == status["pid"] == demo.pid
        assert psutil.Process(model["core_pid"]).ppid() == model["pid"]
        assert model["generation"] >= 1
        assert model["restarts"] >= 0
        assert len(model["cpus"]) == 1
        assert 300e6 < model["memory_bytes"] < 2500e6, name
        assert model["active_requests"] == 0
        assert datetime.fromisoformat(model["since"]).tzinfo is not None
        assert (await ask(model["port"])).status_code == 200
    assert (await demo.ctl("--json", "status", MODEL)).json()["port"] == status["models"][MODEL]["port"]


async def test_status_for_people(demo: Daemon) -> None:
    status = await demo.ready()
    ran = await demo.ctl("status")
    assert ran.code == CtlExit.OK
    for name, model in status["models"].items():
        [line] = [line for line in ran.out.splitlines() if line.startswith(name)]
        assert "ready" in line
        assert str(model["port"]) in line
    assert "\x1b" not in ran.out, "no colour where it is piped"
    one = await demo.ctl("status", MODEL)
    assert str(status["models"][MODEL]["core_pid"]) in one.out


async def test_exit_codes(demo: Daemon) -> None:
    await demo.ready()
    unknown = await demo.ctl("restart", "no-such-model")
    assert unknown.code == CtlExit.UNKNOWN_MODEL
    assert "no-such-model" in unknown.err
    assert MODEL in unknown.err, "and says which there are"
    assert (await demo.ctl("restart")).code == CtlExit.USAGE
    assert (await demo.ctl("--socket", str(demo.place / "none.sock"), "status")).code == CtlExit.UNREACHABLE
    assert (await demo.ctl("version")).out.split() == [
        "citadelctl", __version__, "citadel-supervisor", __version__, "(pid", f"{demo.pid})"
    ]  # fmt: skip


async def test_a_stopped_model_keeps_its_port_and_says_so(demo: Daemon) -> None:
    before = await demo.ready()
    port = before["models"][MODEL]["port"]
    ran = await demo.ctl("stop", MODEL)
    assert (ran.code, ran.out.strip()) == (CtlExit.OK, f"{MODEL}: stopped")
    stopped = await demo.status()
    assert stopped["models"][MODEL]["state"] == "stopped"
    assert stopped["models"][MODEL]["reason"] == "stopped by an operator"
    assert stopped["models"][MODEL]["pid"] is None
    assert not psutil.pid_exists(before["models"][MODEL]["core_pid"])

    answer = await ask(port)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    error = answer.json()["error"]
    assert error["code"] == "model_not_ready"
    assert f"'{MODEL}' is stopped: stopped by an operator" in error["message"]
    async with httpx.AsyncClient() as http:
        health = await http.get(f"http://127.0.0.1:{port}/health")
    assert (health.status_code, health.json()["state"]) == (503, "stopped")
    router = before["ports"]["router"]
    assert (await ask(router, model=MODEL)).status_code == 503
    assert (await ask(router, model="auto")).status_code == 200

    assert (await demo.ctl("start", MODEL)).code == CtlExit.OK
    after = await demo.status()
    assert after["models"][MODEL]["state"] == "ready"
    assert after["models"][MODEL]["generation"] == before["models"][MODEL]["generation"] + 1
    assert after["models"][MODEL]["port"] == port
    assert (await ask(port)).status_code == 200
    assert engines(after, OTHERS) == engines(before, OTHERS)


async def test_a_drained_model_finishes_and_stays_loaded(demo: Daemon) -> None:
    before = await demo.ready()
    port = before["models"][MODEL]["port"]
    async with load(port) as requests:
        stream = requests.stream(MODEL, 40)
        await stream.output()
        draining = asyncio.create_task(demo.ctl("drain", MODEL))
        await demo.until(lambda status: status["models"][MODEL]["state"] == "draining")
        refused = await ask(port)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "drain" in refused.json()["error"]["message"]
        assert (await stream.end()).whole
    assert (await draining).code == CtlExit.OK
    drained = await demo.status()
    assert drained["models"][MODEL]["state"] == "draining"
    assert engines(drained, [MODEL])[0][:3] == engines(before, [MODEL])[0][:3], "the engine is still there"
    assert psutil.pid_exists(before["models"][MODEL]["core_pid"])
    assert (await ask(port)).status_code == 503

    assert (await demo.ctl("start", MODEL)).code == CtlExit.OK
    after = await demo.status()
    assert after["models"][MODEL]["state"] == "ready"
    assert engines(after, [MODEL])[0][:3] == engines(before, [MODEL])[0][:3], "no new generation"
    assert (await ask(port)).status_code == 200


async def test_a_request_waits_while_its_model_restarts(demo: Daemon) -> None:
    """One in flight is finished by the old engine; one that comes is answered by the new."""
    before = await demo.ready()
    model = before["models"][MODEL]
    async with load(model["port"]) as requests:
        stream = requests.stream(MODEL, 30)
        await stream.output()
        assert (await demo.ctl("restart", "--no-wait", MODEL)).code == CtlExit.OK
        await demo.until(lambda status: status["models"][MODEL]["state"] != "ready")
        parked = requests.plain(MODEL, 2)
        await demo.until(lambda status: status["models"][MODEL]["waiting_requests"] == 1)
        assert (await stream.end()).whole, stream.error
        assert (await parked.end()).whole, parked.error
    assert stream.generation == model["generation"]
    assert parked.generation == model["generation"] + 1
    after = await demo.ready()
    assert engines(after, OTHERS) == engines(before, OTHERS)


async def test_what_makes_no_sense_is_refused(demo: Daemon) -> None:
    await demo.ready()
    assert (await demo.ctl("stop", MODEL)).code == CtlExit.OK
    ran = await demo.ctl("drain", MODEL)
    assert ran.code == CtlExit.REFUSED
    assert "only a ready one can be drained" in ran.err
    assert (await demo.ctl("start", MODEL)).code == CtlExit.OK


@pytest.fixture
def edit(demo: Daemon) -> Iterator[Callable[[Callable[[Any], None]], Path]]:
    """Changes the daemon's configuration file."""
    original = demo.config.read_text()

    def change(how: Callable[[Any], None]) -> Path:
        data = yaml.safe_load(demo.config.read_text())
        how(data)
        demo.config.write_text(yaml.safe_dump(data))
        return demo.config

    yield change
    demo.config.write_text(original)


async def test_an_invalid_file_changes_nothing(
    demo: Daemon, edit: Callable[[Callable[[Any], None]], Path]
) -> None:
    before = await demo.ready()

    def spoil(data: Any) -> None:
        data["models"][MODEL]["max_model_len"] = "long"
        data["models"][OTHERS[0]]["max_num_seqs"] = 5
        data["gatewey"] = {}

    edit(spoil)
    ran = await demo.ctl("reload")
    assert ran.code == CtlExit.FAILED
    assert f"models.{MODEL}.max_model_len" in ran.err
    assert "gatewey" in ran.err
    assert "gateway" in ran.err, "and a suggestion"
    after = await demo.ready()
    assert engines(after, list(MODELS)) == engines(before, list(MODELS))
    for_programs = await demo.ctl("reload", "--json")
    assert for_programs.code == CtlExit.FAILED
    assert "max_model_len" in for_programs.json()["error"]["message"]


async def test_a_changed_model_alone_is_restarted(
    demo: Daemon, edit: Callable[[Callable[[Any], None]], Path]
) -> None:
    before = await demo.ready()
    edit(lambda data: data["models"][MODEL].update(max_model_len=1024))
    ran = await demo.ctl("reload", "--json")
    assert ran.code == CtlExit.OK
    assert ran.json() == {"changed": [MODEL], "unchanged": OTHERS, "restart_needed": []}
    await demo.until(lambda status: status["models"][MODEL]["pid"] != before["models"][MODEL]["pid"])
    after = await demo.ready()
    assert after["models"][MODEL]["generation"] == before["models"][MODEL]["generation"] + 1
    assert engines(after, OTHERS) == engines(before, OTHERS)
    too_long = await ask(after["models"][MODEL]["port"], prompt=[5] * 1500)
    assert too_long.status_code == 400, "the new setting holds"
    assert "1024" in too_long.json()["error"]["message"]


@pytest.fixture(autouse=True)
async def _as_configured(request: pytest.FixtureRequest, demo: Daemon) -> Any:
    """After a test that changed the file: back to what it was, for the other tests."""
    yield
    if "edit" in request.fixturenames:
        assert (await demo.ctl("reload")).code == CtlExit.OK


async def test_events_are_kept_and_followed(demo: Daemon) -> None:
    await demo.ready()
    follower = await demo.ctl_process("events", "--follow", "--json")
    assert follower.stdout is not None
    assert (await demo.ctl("stop", MODEL)).code == CtlExit.OK
    seen = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            seen.append(json.loads(await follower.stdout.readline()))
            if seen[-1]["kind"] == "audit" and (seen[-1]["action"], seen[-1]["target"]) == ("stop", MODEL):
                break
    follower.terminate()
    await follower.wait()
    assert seen[-1]["outcome"] == "ok"
    assert seen[-1]["uid"] == psutil.Process().uids().real
    moves = [
        (one["before"], one["after"]) for one in seen if one["kind"] == "transition" and one["model"] == MODEL
    ]
    assert moves[-3:] == [("ready", "draining"), ("draining", "stopping"), ("stopping", "stopped")]
    kept = [json.loads(line) for line in (await demo.ctl("events", "--json")).out.splitlines()]
    assert seen == kept[: len(seen)] or seen == kept[-len(seen) :]
    assert (await demo.ctl("start", MODEL)).code == CtlExit.OK
    assert f"{MODEL}" in (await demo.ctl("events")).out


async def test_logs_are_shown_and_followed(demo: Daemon) -> None:
    await demo.ready()
    ran = await demo.ctl("logs", "supervisor", "-n", "100000")
    assert ran.code == CtlExit.OK
    assert f"router {(await demo.status())['ports']['router']}" in ran.out, "its banner"
    assert "Demo: all four models are stand-ins" in ran.out
    last = await demo.ctl("logs", MODEL, "-n", "3", "--json")
    lines = [json.loads(line) for line in last.out.splitlines()]
    assert len(lines) == 3
    assert {line["model"] for line in lines} == {MODEL}

    follower = await demo.ctl_process("logs", "--follow", "-n", "0", "supervisor")
    assert follower.stdout is not None
    reading = asyncio.create_task(follower.stdout.readuntil(b"configuration reloaded"))
    async with asyncio.timeout(PATIENCE_S):
        while not reading.done():  # it may not follow yet when the first is written
            assert (await demo.ctl("reload")).code == CtlExit.OK
            await asyncio.wait([reading], timeout=1)
    follower.terminate()
    await follower.wait()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_socket_speaks_http_to_curl(demo: Daemon) -> None:
    await demo.ready()

    async def curl(*words: str) -> Any:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--unix-socket", demo.socket, *words, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return json.loads(out)

    status = await curl("http://citadel/v1/status")
    assert list(status["models"]) == list(MODELS)
    unknown = await curl("-X", "POST", "http://citadel/v1/models/nope/restart")
    assert unknown["error"]["code"] == "unknown_model"
    assert unknown["error"]["known"] == list(MODELS)
    assert demo.socket.stat().st_mode & 0o777 == 0o660
