"""What each port answers, and what it never does."""

from __future__ import annotations

import asyncio
import json

import pytest
from loguru import logger
from prometheus_client import exposition

from citadel_supervisor.gateway.ports import RELAYED
from citadel_supervisor.states import Progress, WorkerState
from tests.fake_upstream import SECONDS
from tests.gateway.conftest import MODELS, MakeRig, Rig

CHAT = "/v1/chat/completions"
POSTS = sorted(path.decode() for path in RELAYED)
DATA_PORTS = ["router", *MODELS]

# Of vLLM's own endpoints, those that must not be reached from outside, and other spellings of those that may.
HIDDEN = [
    "/", "/invocations", "/load", "/version", "/ping", "/docs", "/openapi.json", "/redoc",
    "/generative_scoring", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/pause", "/resume", "/sleep",
    "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/start_profile", "/server_info",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/score", "/rerank", "/v1/rerank",
    "/v2/rerank", "/pooling", "/classify", "/tokenizer_info", "/inference/v1/generate",
    "/v1/messages/count_tokens", "/v1/responses/abc", "/v1/chat/completions/render",
    "/v1/audio/transcriptions", "/abort_requests",
]  # fmt: skip
TRICKS = [
    "//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/", "/v1/chat/completions//",
    "/v1/chat%2Fcompletions", "/v1/chat%2fcompletions", "/%761/chat/completions",
    "/v1/./chat/completions", "/v1/../v1/chat/completions", "/%2e%2e/v1/chat/completions",
    "/V1/chat/completions", "/v1/chat/completions;x", "/v1/chat/completions%20",
    "/v1/chat/completions%00", "/v1/chat/completions%3Fa", "/v1/models/../../load", "/v1/models/",
    "/v1/models/%2e%2e/load", "/health/", "/metrics/", "/tokenize/../load", "/%6coad",
]  # fmt: skip


def engines_requests(rig: Rig) -> int:
    return sum(engine.requests for engine in rig.engines.values())


@pytest.mark.parametrize("path", HIDDEN + TRICKS)
async def test_anything_else_never_reaches_an_engine(rig: Rig, path: str) -> None:
    for purpose in DATA_PORTS:
        client = await rig.client(purpose)
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            client.get(path, method, {"Content-Length": "0"})
            answer = await client.answer(bodyless=method == "HEAD")
            assert answer.status in (404, 405), (purpose, method, answer)
    assert engines_requests(rig) == 0
    assert not rig.records


async def test_what_is_not_there_is_said_in_openais_form(rig: Rig) -> None:
    answer = await rig.post("/load")
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert answer.json()["error"] == {
        "message": "there is nothing at /load on this port",
        "type": "not_found_error",
        "param": None,
        "code": "not_found",
    }


@pytest.mark.parametrize("path", POSTS)
async def test_every_allowed_endpoint_is_relayed_on_every_data_port(rig: Rig, path: str) -> None:
    for engine in rig.engines.values():
        engine.answer = lambda call: call.reply(200, b"by " + call.target)
    for purpose in DATA_PORTS:
        assert (await rig.post(path, purpose=purpose)).body == b"by " + path.encode()


@pytest.mark.parametrize("path", [*POSTS, "/v1/models", "/v1/models/alpha", "/health", "/metrics"])
async def test_the_wrong_method_names_the_right_one(rig: Rig, path: str) -> None:
    right = "POST" if path in POSTS else "GET"
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        if method != right:
            answer = await rig.get(path, method=method)
            assert (answer.status, answer.headers["allow"]) == (405, right)
    assert engines_requests(rig) == 0


async def test_the_absolute_form_of_a_target_is_the_same_path(rig: Rig) -> None:
    client = await rig.client()
    client.post("http://elsewhere.example" + CHAT)
    call = await rig.engine.call()
    assert call.target == CHAT.encode()
    call.reply(200, b"{}")
    assert (await client.answer()).status == 200


# Which model answers.


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "alpha"}', "alpha"),
        (b'{"model": "beta"}', "beta"),
        (b'{"model": "beta-alias", "messages": [{"model": "alpha"}]}', "beta"),
        (b'{"model": "auto"}', "alpha"),
        (b'{"model": ""}', "alpha"),
        (b'{"model": null}', "alpha"),
        (b"{}", "alpha"),
    ],
)
async def test_the_router_passes_a_request_to_the_model_it_names(rig: Rig, body: bytes, model: str) -> None:
    client = await rig.client("router")
    client.post(CHAT, body)
    call = await rig.engines[model].call()
    assert call.body == body
    call.reply(200, b"{}")
    answer = await client.answer()
    assert answer.headers["x-citadel-model"] == model
    assert (await rig.done()).model == model


async def test_the_router_spreads_what_names_no_model(rig: Rig) -> None:
    clients = [await rig.client("router") for _ in range(4)]
    for client in clients:
        client.post(CHAT)
    calls = [await rig.engines[model].call() for model in (*MODELS, *MODELS)]
    for call in calls:
        call.reply(200, b"{}")
    assert [(await client.answer()).headers["x-citadel-model"] for client in clients] == [*MODELS, *MODELS]


async def test_an_unknown_model_is_a_404(rig: Rig) -> None:
    answer = await rig.post(CHAT, b'{"model": "../../etc/passwd"}', "router")
    assert answer.status == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")
    assert error["message"] == "model '../../etc/passwd' does not exist; known: alpha, beta, auto"
    record = await rig.done()
    assert (record.status, record.model, record.endpoint) == (404, "", CHAT)
    assert engines_requests(rig) == 0


async def test_errors_on_messages_have_anthropics_form(rig: Rig) -> None:
    answer = await rig.post("/v1/messages", b'{"model": "gamma"}', "router")
    assert answer.status == 404
    data = answer.json()
    assert (data["type"], data["error"]["type"]) == ("error", "not_found_error")
    assert set(data["error"]) == {"type", "message"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "a"', "not valid JSON"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b'{"x": NaN}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"alpha"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": 1}', "'model' must be a string"),
        (b'{"model": ["alpha"]}', "'model' must be a string"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
async def test_a_body_without_sense_is_a_400(rig: Rig, body: bytes, message: str) -> None:
    answer = await rig.post(CHAT, body, "router")
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert error["param"] == ("model" if "'model'" in message else None)
    assert (await rig.done()).status == 400


# The size of a body.


async def test_too_large_a_body_is_refused_by_its_length(make_rig: MakeRig) -> None:
    rig = await make_rig(max_body=1000)
    client = await rig.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n".encode())
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert answer.json()["error"]["code"] == "request_too_large"
    assert await client.closed() == b""
    assert (await rig.done()).status == 413
    assert engines_requests(rig) == 0


async def test_too_large_a_body_is_refused_as_soon_as_it_exceeds(make_rig: MakeRig) -> None:
    rig = await make_rig(max_body=1000)
    client = await rig.client("router")
    client.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    client.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
    client.send(b"1\r\nx\r\n")  # and no end
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert await client.closed() == b""


async def test_anthropics_form_for_too_large_a_body(make_rig: MakeRig) -> None:
    rig = await make_rig(max_body=10)
    answer = await rig.post("/v1/messages", b"x" * 11)
    assert (answer.status, answer.json()["error"]["type"]) == (413, "request_too_large")


async def test_a_body_of_just_the_limit_passes(make_rig: MakeRig) -> None:
    rig = await make_rig(max_body=1000)
    rig.engine.answer = lambda call: call.reply(200, b"%d" % len(call.body))
    assert (await rig.post(CHAT, b"x" * 1000)).body == b"1000"


# The gateway's own endpoints.


def card(model: str, state: str = "ready") -> dict[str, object]:
    return {
        "id": model, "object": "model", "owned_by": "citadel", "root": f"/models/{model}", "parent": None,
        "max_model_len": 4096, "state": state,
    }  # fmt: skip


async def test_the_models_are_listed(rig: Rig) -> None:
    await rig.alpha.become(WorkerState.LOADING)
    listed = (await rig.get("/v1/models", "router")).json()
    assert listed["object"] == "list"
    assert all(isinstance(model.pop("created"), int) for model in listed["data"])
    assert listed["data"] == [card("alpha", "loading"), card("beta")]
    (own,) = (await rig.get("/v1/models", "beta")).json()["data"]
    assert own["id"] == "beta"


@pytest.mark.parametrize(
    ("purpose", "name", "model"),
    [
        ("router", "alpha", "alpha"),
        ("router", "beta-alias", "beta"),
        ("router", "auto", "alpha"),
        ("router", "gamma", None),
        ("router", "..%2f..%2fetc%2fpasswd", None),
        ("beta", "beta", "beta"),
        ("beta", "beta-alias", "beta"),
        ("beta", "auto", "beta"),
        ("beta", "alpha", None),
    ],
)
async def test_one_model_by_name(rig: Rig, purpose: str, name: str, model: str | None) -> None:
    answer = await rig.get(f"/v1/models/{name}", purpose)
    if model is None:
        assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
    else:
        data = answer.json()
        del data["created"]
        assert (answer.status, data) == (200, card(model))


async def test_metrics_are_those_of_the_ports_scope(rig: Rig) -> None:
    for purpose, scope in (("router", None), ("metrics", None), ("alpha", "alpha"), ("beta", "beta")):
        answer = await rig.get("/metrics", purpose)
        assert (answer.status, answer.body) == (200, f"# of {scope}\n".encode())
        assert answer.headers["content-type"] == exposition.CONTENT_TYPE_PLAIN_0_0_4


@pytest.mark.parametrize(
    ("purpose", "path"), [("metrics", "/health"), ("health", "/metrics"), ("health", "/")]
)
async def test_the_other_ports_answer_nothing_else(rig: Rig, purpose: str, path: str) -> None:
    assert (await rig.get(path, purpose)).status == 404
    for post in POSTS:
        assert (await rig.post(post, purpose=purpose)).status == 404
    assert engines_requests(rig) == 0


@pytest.mark.parametrize("state", list(WorkerState))
async def test_a_models_health_in_each_state(rig: Rig, state: WorkerState) -> None:
    await rig.alpha.become(state, "the reason", progress=Progress("weights", 120_000_000, 269_000_000))
    answer = await rig.get("/health")
    data = answer.json()
    assert data["status"] == state
    if state is WorkerState.READY:
        assert answer.status == 200
    else:
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert data["reason"] == "the reason"
        assert data["progress"] == "weights 44 % (120 of 269 MB)"
    assert (data["model"], data["generation"]) == ("alpha", 1)


@pytest.mark.parametrize("purpose", ["router", "health"])
async def test_the_whole_is_healthy_while_one_model_is(rig: Rig, purpose: str) -> None:
    await rig.alpha.become(WorkerState.LOADING, progress=Progress("kv_cache"))
    answer = await rig.get("/health", purpose)
    data = answer.json()
    assert (answer.status, data["status"]) == (200, "ready")
    assert {model: health["state"] for model, health in data["models"].items()} == {
        "alpha": "loading",
        "beta": "ready",
    }
    assert data["models"]["alpha"]["progress"] == "kv cache"
    await rig.backends["beta"].become(WorkerState.QUARANTINED, "bad checkpoint")
    answer = await rig.get("/health", purpose)
    assert (answer.status, answer.json()["status"], answer.headers["retry-after"]) == (
        503,
        "unavailable",
        "2",
    )


# Draining.


async def test_draining_finishes_what_is_in_flight_and_takes_nothing_new(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT)
    call = await rig.engine.call()
    rig.gateway.begin_drain()
    for purpose in ("router", "alpha", "health"):
        health = await rig.get("/health", purpose)
        assert (health.status, health.json()["status"]) == (503, "draining")
    refused = await rig.post(CHAT)
    assert (refused.status, refused.headers["connection"]) == (503, "close")
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "draining"
    assert (await rig.done()).status == 503
    assert (await rig.get("/metrics")).status == 200
    assert not await rig.gateway.drained(0.01)
    over = asyncio.create_task(rig.gateway.drained(SECONDS))
    also = asyncio.create_task(rig.gateway.drained(SECONDS))
    await asyncio.sleep(0)
    call.reply(200, b"finished")
    assert (await client.answer()).body == b"finished"
    async with asyncio.timeout(SECONDS / 2):
        assert await over
        assert await also
    assert rig.gateway.active == 0
    assert await rig.gateway.drained(0)


# What goes wrong inside.


async def test_a_bug_is_a_500_logged_once_and_the_server_goes_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{extra[request_id]} {message}", backtrace=False, diagnose=False)
    rig.alpha.snapshot = None  # type: ignore[assignment,method-assign]
    client = await rig.client()
    client.get("/health", headers={"X-Request-Id": "r1"})
    answer = await client.answer()
    logger.remove(sink)
    assert answer.status == 500
    assert answer.json()["error"]["type"] == "internal_error"
    assert "NoneType" not in answer.body.decode()
    assert answer.headers["x-request-id"] == "r1"
    assert [line.splitlines()[0] for line in lines] == ["r1 a request failed by a bug"]
    assert "TypeError" in lines[0]
    assert not caplog.records
    client.get("/v1/models", headers={"X-Request-Id": "r2"})
    assert (await client.answer()).status == 500
    assert (await rig.get("/health", "beta")).status == 200


async def test_a_bug_within_a_relayed_request_is_recorded_and_frees_everything(rig: Rig) -> None:
    async def broken(wait_s: float) -> None:
        raise RuntimeError("a bug")

    rig.alpha.lease = broken  # type: ignore[assignment,method-assign]
    answer = await rig.post("/v1/messages")
    assert (answer.status, answer.json()["error"]["type"]) == (500, "api_error")
    assert (await rig.done()).status == 500
    assert rig.gateway.active == 0


async def test_a_new_configuration_holds_from_the_next_request_on(rig: Rig) -> None:
    client = await rig.client()
    client.post(CHAT, b"before")
    call = await rig.engine.call()
    changed = json.loads(rig.settings.model_dump_json())
    changed["gateway"]["max_body"] = 3
    rig.gateway.configure(type(rig.settings).model_validate(changed), rig.ports, rig.backends)
    assert (await rig.post(CHAT, b"after")).status == 413
    call.reply(200, b"by the old")
    assert (await client.answer()).body == b"by the old"
