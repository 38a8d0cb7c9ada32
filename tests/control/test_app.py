"""The control API over a real socket: what it answers, and what it tells the daemon to do."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from loguru import logger

from citadel_supervisor.control.peers import Gate
from citadel_supervisor.control.server import ControlServer, bind_control_socket
from citadel_supervisor.errors import CommandRefused, ConfigError
from citadel_supervisor.events import Notice
from tests.control.fake_api import FakeSupervisor, fake_model


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[FakeSupervisor, httpx.AsyncClient, ControlServer]]:
    api = FakeSupervisor(directory)
    sock = bind_control_socket(directory / "control.sock")
    gate = Gate.for_group(None)
    server = ControlServer(api, sock, gate=gate, publish=api.bus.publish, log_poll_s=0.01, grace_s=1)
    await server.start()
    transport = httpx.AsyncHTTPTransport(uds=str(directory / "control.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://citadel", timeout=30) as client:
        try:
            yield api, client, server
        finally:
            await server.stop()


async def audit_of(api: FakeSupervisor) -> dict[str, Any]:
    """The next audit record; it may come a moment after the answer, or without one."""
    async for event in api.follow_events():
        if event["kind"] == "audit":
            return event
    raise AssertionError("the events ended")


async def test_status_and_models_are_the_daemons_own(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        assert (await client.get("/v1/status")).json() == api.status()
        assert (await client.get("/v1/models/phi-3-mini")).json() == fake_model("phi-3-mini", 11403)
        version = (await client.get("/v1/version")).json()
        assert version == {"version": "0.1.0", "api": "v1", "pid": os.getpid()}


@pytest.mark.parametrize(
    ("action", "body", "call"),
    [
        ("start", None, ("start", "phi-3-mini", True)),
        ("start", {"wait": False}, ("start", "phi-3-mini", False)),
        ("stop", {"drain_s": 1.5}, ("stop", "phi-3-mini", True, 1.5)),
        ("stop", {}, ("stop", "phi-3-mini", True, None)),
        ("restart", {"wait": False, "drain_s": 0}, ("restart", "phi-3-mini", False, 0.0)),
        ("drain", {}, ("drain", "phi-3-mini", True)),
    ],
)
async def test_a_command_reaches_the_daemon_and_the_audit_trail(
    directory: Path, action: str, body: dict[str, Any] | None, call: tuple[Any, ...]
) -> None:
    async with serving(directory) as (api, client, _):
        response = await client.post(f"/v1/models/phi-3-mini/{action}", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["id"] == "phi-3-mini"
        assert api.calls == [call]
        (audit,) = api.audits
        assert (audit.uid, audit.pid, audit.action) == (os.getuid(), os.getpid(), action)
        assert (audit.target, audit.outcome) == ("phi-3-mini", "ok")


async def test_a_waited_for_command_answers_when_it_has_settled(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        api.settle.clear()
        waiting = asyncio.create_task(client.post("/v1/models/phi-3-mini/restart"))
        await api.called.wait()
        assert (await client.get("/v1/models/phi-3-mini")).json()["state"] == "loading"
        assert not waiting.done()
        api.settle.set()
        assert (await waiting).json()["state"] == "ready"


@pytest.mark.parametrize(
    ("path", "body", "complaint"),
    [
        ("models/phi-3-mini/start", b'{"wiat": true}', "wiat"),
        ("models/phi-3-mini/start", b'{"drain_s": 1}', "drain_s"),
        ("models/phi-3-mini/stop", b'{"wait": "yes"}', "bool"),
        ("models/phi-3-mini/stop", b'{"drain_s": -1}', ">= 0"),
        ("models/phi-3-mini/stop", b'{"drain_s": NaN}', "malformed"),
        ("models/phi-3-mini/stop", b'{"drain_s": 1e999}', "body"),
        ("models/phi-3-mini/stop", b"[]", "object"),
        ("models/phi-3-mini/stop", b"\xff\xfe", "body"),
        ("models/phi-3-mini/stop", b'{"a":' * 12_000, "body"),
        ("models/phi-3-mini/stop?wait=0", b"", "unknown query parameter 'wait'"),
        ("reload", b'{"force": true}', "force"),
    ],
)
async def test_a_wrong_body_is_refused_and_nothing_is_done(
    directory: Path, path: str, body: bytes, complaint: str
) -> None:
    async with serving(directory) as (api, client, _):
        response = await client.post(f"/v1/{path}", content=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "invalid"
        assert complaint in error["message"]
        assert api.calls == []
        assert api.audits == []


@pytest.mark.parametrize(
    "query", ["lines=-1", "lines=x", "lines=100001", "follow=2", "tail=1", "lines=1&lines=2"]
)
async def test_a_wrong_query_is_refused(directory: Path, query: str) -> None:
    async with serving(directory) as (_, client, _):
        response = await client.get(f"/v1/logs/phi-3-mini?{query}")
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid"


@pytest.mark.parametrize("model", ["gpt-5", "..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "supervisor%0a"])
async def test_an_unknown_model_is_404_everywhere(directory: Path, model: str) -> None:
    async with serving(directory) as (api, client, _):
        for method, path in (("GET", "models/{}"), ("POST", "models/{}/stop"), ("GET", "logs/{}")):
            response = await client.request(method, "/v1/" + path.format(model))
            assert response.status_code == 404
            assert response.json()["error"]["code"] in ("unknown_model", "not_found")
        assert api.calls == []


async def test_an_unknown_model_is_told_the_known_ones(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        error = (await client.post("/v1/models/phi-4/stop")).json()["error"]
        assert error["known"] == ["mixtral-8x7b", "phi-3-mini"]
        assert [audit.outcome for audit in api.audits] == ["unknown_model"]
        await client.post("/v1/models/" + "x" * 5000 + "/stop")
        assert api.audits[-1].target == "x" * 64


async def test_what_the_daemon_refuses_says_why(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        api.refusals["drain"] = CommandRefused("phi-3-mini is stopped; there is nothing to drain")
        response = await client.post("/v1/models/phi-3-mini/drain")
        assert response.status_code == 409
        assert response.json()["error"] == {
            "message": "phi-3-mini is stopped; there is nothing to drain",
            "code": "refused",
        }
        assert [audit.outcome for audit in api.audits] == ["refused"]


async def test_reload_tells_what_changed_or_every_problem(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        assert (await client.post("/v1/reload")).json()["changed"] == ["phi-3-mini"]
        api.refusals["reload"] = ConfigError("citadel.yaml", ["models.x.port: too large", "gatway: unknown"])
        response = await client.post("/v1/reload")
        assert response.status_code == 422
        assert response.json()["error"]["problems"] == ["models.x.port: too large", "gatway: unknown"]
        assert [(audit.action, audit.outcome) for audit in api.audits] == [
            ("reload", "ok"),
            ("reload", "config"),
        ]


async def test_a_second_reload_meanwhile_is_refused(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        api.settle.clear()
        first = asyncio.create_task(client.post("/v1/reload"))
        await api.called.wait()
        assert (await client.post("/v1/reload")).status_code == 409
        api.settle.set()
        assert (await first).status_code == 200
        assert api.calls == [("reload",)]


async def test_a_bug_is_500_without_a_stack_trace_but_the_log_has_it(directory: Path) -> None:
    written: list[str] = []
    sink = logger.add(written.append, level="ERROR")
    async with serving(directory) as (api, client, _):
        api.refusals["stop"] = RuntimeError("secret detail")
        response = await client.post("/v1/models/phi-3-mini/stop")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal"
        assert "secret detail" not in response.text
        assert [audit.outcome for audit in api.audits] == ["internal"]
        assert (await client.get("/v1/status")).status_code == 200
    logger.remove(sink)
    assert "Traceback" in written[0] and "secret detail" in written[0]
    assert len(written) == 1


async def test_wrong_methods_and_paths_are_json_errors(directory: Path) -> None:
    async with serving(directory) as (_, client, _):
        response = await client.get("/v1/models/phi-3-mini/stop")
        assert (response.status_code, response.json()["error"]["code"]) == (405, "method")
        assert response.headers["allow"] == "POST"
        for path in ("/", "/v1/models", "/v1/models/phi-3-mini/explode", "/docs"):
            response = await client.post(path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_a_caller_that_leaves_ends_the_waiting_but_not_the_command(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        api.settle.clear()
        before = asyncio.all_tasks()
        audit = asyncio.create_task(audit_of(api))
        leaving = asyncio.create_task(client.post("/v1/models/phi-3-mini/stop"))
        await api.called.wait()
        leaving.cancel()
        assert (await audit)["outcome"] == "caller left before the end"
        api.settle.set()
        await asyncio.gather(leaving, return_exceptions=True)
        # Nothing goes on waiting for a caller that has gone, and the command went on without it.
        rest = asyncio.all_tasks() - before
        assert not rest or not (await asyncio.wait(rest, timeout=30))[1]
        assert api.models["phi-3-mini"]["state"] == "stopped"


async def test_events_are_the_kept_ones_then_all_to_come_none_twice(directory: Path) -> None:
    async with serving(directory) as (api, client, _):
        for number in range(3):
            api.bus.publish(Notice(level="INFO", text=str(number)))
        kept = (await client.get("/v1/events")).text.splitlines()
        assert [json.loads(line)["text"] for line in kept] == ["0", "1", "2"]

        async with client.stream("GET", "/v1/events?follow=1") as response:
            assert response.headers["content-type"] == "application/x-ndjson"
            lines = response.aiter_lines()
            seen = [json.loads(await anext(lines))["text"] for _ in range(3)]
            for number in range(3, 6):
                api.bus.publish(Notice(level="INFO", text=str(number)))
                seen.append(json.loads(await anext(lines))["text"])
        assert seen == ["0", "1", "2", "3", "4", "5"]


async def test_events_at_the_seam_are_shown_once(directory: Path) -> None:
    """Just before the server looks back, an event is in both; just after, only among those to come."""

    class Eventful(FakeSupervisor):
        def recent_events(self) -> list[dict[str, Any]]:
            self.bus.publish(Notice(level="INFO", text="before"))
            kept = super().recent_events()
            self.bus.publish(Notice(level="INFO", text="after"))
            return kept

    api = Eventful(directory)
    sock = bind_control_socket(directory / "control.sock")
    server = ControlServer(api, sock, gate=Gate.for_group(None), publish=api.bus.publish, grace_s=1)
    await server.start()
    transport = httpx.AsyncHTTPTransport(uds=str(directory / "control.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://citadel") as client:
        async with client.stream("GET", "/v1/events?follow=1") as response:
            lines = response.aiter_lines()
            seen = [json.loads(await anext(lines))["text"] for _ in range(2)]
            api.bus.publish(Notice(level="INFO", text="later"))
            seen.append(json.loads(await anext(lines))["text"])
            assert seen == ["before", "after", "later"]
    await server.stop()


async def test_stopping_ends_streams_cleanly_and_answers_those_who_wait(directory: Path) -> None:
    async with serving(directory) as (api, client, server):
        api.settle.clear()
        log = directory / "phi-3-mini.log"
        log.write_text("one\n")
        waiting = asyncio.create_task(client.post("/v1/models/phi-3-mini/stop"))
        await api.called.wait()
        async with client.stream("GET", "/v1/events?follow=1") as events:
            async with client.stream("GET", "/v1/logs/phi-3-mini?follow=1") as logs:
                text = logs.aiter_text()
                assert await anext(text) == "one\n"
                await server.stop()
                assert [part async for part in text] == []
            await events.aread()
        assert (await waiting).json()["error"]["code"] == "stopping"
        assert not (directory / "control.sock").exists()
