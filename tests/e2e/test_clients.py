"""The API as clients see it: the official ones, unmodified, through every port and through the router."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.daemon import DEMO_CHECKPOINT, MODELS, Daemon

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ROUTER_MODEL = "hermes-2"
PARIS = "The capital of France is Paris."
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


class Target:
    """One of the ports, and a model to ask for there."""

    def __init__(self, port: int, model: str, generation: int) -> None:
        self.port = port
        self.model = model
        self.generation = generation
        self.url = f"http://127.0.0.1:{port}"


@pytest.fixture(params=[*MODELS, "router"])
async def target(request: pytest.FixtureRequest, demo: Daemon) -> Target:
    status = await demo.ready()
    model = ROUTER_MODEL if request.param == "router" else request.param
    port = status["ports"]["router"] if request.param == "router" else status["models"][model]["port"]
    return Target(port, model, status["models"][model]["generation"])


@pytest.fixture
async def client(target: Target) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{target.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(target: Target) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=target.url, timeout=120) as client:
        yield client


@pytest.fixture
async def router(demo: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    status = await demo.ready()
    url = f"http://127.0.0.1:{status['ports']['router']}"
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        yield client


async def test_chat_streamed_or_not_says_paris(client: openai.AsyncOpenAI, target: Target) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=target.model, messages=QUESTION, temperature=0, max_tokens=24
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == PARIS
    assert answer.model == target.model
    assert raw.headers["x-citadel-model"] == target.model
    assert raw.headers["x-citadel-generation"] == str(target.generation)
    assert raw.headers["x-request-id"]

    parts = []
    async with await client.chat.completions.create(
        model=target.model, messages=QUESTION, temperature=0, max_tokens=24, stream=True
    ) as stream:
        assert stream.response.headers["x-citadel-model"] == target.model
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == PARIS
    assert len([part for part in parts if part]) == 7, "a chunk for each token"


async def test_completions_streamed_or_not_are_the_same(client: openai.AsyncOpenAI, target: Target) -> None:
    answer = await client.completions.create(
        model=target.model, prompt="The capital of France is", temperature=0, max_tokens=6, logprobs=2
    )
    [choice] = answer.choices
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == 6
    assert choice.logprobs.top_logprobs is not None
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 6

    async with await client.completions.create(
        model=target.model, prompt="The capital of France is", temperature=0, max_tokens=6, stream=True
    ) as stream:
        parts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(parts) == choice.text
    assert len(parts) >= 6


async def test_chat_logprobs(client: openai.AsyncOpenAI, target: Target) -> None:
    answer = await client.chat.completions.create(
        model=target.model, messages=QUESTION, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["The", " capital", " of"]
    assert all(-20 < entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in logprobs.content)


async def test_models_say_honestly_what_serves_them(client: openai.AsyncOpenAI, target: Target) -> None:
    card = await client.models.retrieve(target.model)
    assert card.id == target.model
    assert card.model_dump()["root"] == str(DEMO_CHECKPOINT)
    listed = [model.id async for model in client.models.list()]
    assert listed == ([target.model] if target.port != await _router_port(client) else list(MODELS))
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("no-such-model")


async def _router_port(client: openai.AsyncOpenAI) -> int:
    """The client's port if it is the router's, which alone knows all models."""
    models = [model.id async for model in client.models.list()]
    return client.base_url.port or 0 if len(models) > 1 else -1


async def test_tokenize_and_back(http: httpx.AsyncClient, target: Target) -> None:
    text = "The capital of France is Paris."
    tokens = (await http.post("/tokenize", json={"model": target.model, "prompt": text})).json()
    assert tokens["count"] == len(tokens["tokens"]) == 7
    back = await http.post("/detokenize", json={"model": target.model, "tokens": tokens["tokens"]})
    assert back.json()["prompt"] == text


async def test_a_wrong_request_is_refused_as_the_client_expects(
    client: openai.AsyncOpenAI, target: Target
) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        await client.chat.completions.create(model="no-such-model", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(
            model=target.model,
            messages=QUESTION,
            temperature="hot",  # type: ignore[call-overload]
        )


async def test_messages_in_anthropics_form(target: Target) -> None:
    ask: dict[str, Any] = {"model": target.model, "max_tokens": 24, "messages": QUESTION}
    async with anthropic.AsyncAnthropic(base_url=target.url, api_key="none", max_retries=0) as client:
        answer = await client.messages.create(**ask, extra_body={"temperature": 0})
        assert answer.content[0].type == "text"
        assert answer.content[0].text == PARIS
        assert answer.stop_reason == "end_turn"
        async with client.messages.stream(**ask, extra_body={"temperature": 0}) as stream:
            assert "".join([text async for text in stream.text_stream]) == PARIS
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**ask, "model": "no-such-model"})


@pytest.mark.parametrize("target", ["phi-3-mini", "router"], indirect=True)
async def test_the_answer_is_the_engines_own(http: httpx.AsyncClient, target: Target, demo: Daemon) -> None:
    """Status, headers that matter and body are what the engine says, but for what differs each time."""
    engine = httpx.AsyncHTTPTransport(uds=str(demo.engine_socket(target.model, target.generation)))
    async with httpx.AsyncClient(transport=engine, base_url="http://engine", timeout=120) as straight:
        for path, body in (
            ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 8, "logprobs": True, "seed": 5}),
            ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8, "echo": True, "seed": 5}),
            ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": -1}),
            ("/v1/chat/completions", {"messages": "wrong"}),
            ("/tokenize", {"messages": QUESTION}),
            ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 6, "stream": True, "seed": 5}),
        ):
            request = {"model": target.model, "temperature": 0, **body}
            through = await http.post(path, json=request)
            direct = await straight.post(path, json=request)
            assert through.status_code == direct.status_code
            assert through.headers["content-type"] == direct.headers["content-type"]
            assert _comparable(through) == _comparable(direct)


def _comparable(answer: httpx.Response) -> list[Any]:
    """The answer's JSON objects without what is new in each."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    parsed = [json.loads(line) for line in lines if line != "[DONE]"]
    assert answer.status_code != 200 or parsed
    for each in parsed:
        for name in ("id", "created", "metrics"):
            each.pop(name, None)
    return [*parsed, len(lines)]


@pytest.mark.parametrize("names", [{}, {"model": "auto"}, {"model": None}, {"model": ""}])
async def test_the_router_chooses_where_no_model_is_named(
    router: httpx.AsyncClient, names: dict[str, Any]
) -> None:
    body = {**names, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    answer = await router.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == PARIS
    assert answer.headers["x-citadel-model"] in MODELS
    assert answer.json()["model"] == answer.headers["x-citadel-model"]


async def test_an_alias_is_a_name_like_any(router: httpx.AsyncClient) -> None:
    for alias, model in (("mixtral", "mixtral-8x7b"), ("phi-3", "phi-3-mini")):
        body = {"model": alias, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
        answer = await router.post("/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == PARIS
        assert answer.headers["x-citadel-model"] == model


async def test_only_the_promised_endpoints_pass(http: httpx.AsyncClient) -> None:
    """These are vLLM's, and are reachable on the engine's own socket."""
    for path in ("/invocations", "/scale_elastic_ep", "/generative_scoring", "/v1/load_lora_adapter"):
        answer = await http.post(path, json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    for path in ("/load", "/version", "/docs", "/openapi.json", "/server_info"):
        assert (await http.get(path)).status_code == 404


async def test_health_and_metrics_of_each_port(http: httpx.AsyncClient, target: Target) -> None:
    health = await http.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ready"
    metrics = (await http.get("/metrics")).text
    assert "llm_requests_total" in metrics
    assert "vllm:num_requests_running" in metrics
