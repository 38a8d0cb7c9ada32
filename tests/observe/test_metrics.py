from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from citadel_supervisor.errors import UpstreamLost
from citadel_supervisor.events import Notice, RequestDone, Transition
from citadel_supervisor.observe import exposition
from citadel_supervisor.observe.exposition import Exposition
from citadel_supervisor.observe.metrics import Metrics, Sources, label_engine_series
from citadel_supervisor.states import WorkerSnapshot
from citadel_supervisor.states import WorkerState as S

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

SNAPSHOTS = [
    WorkerSnapshot("phi", state=S.READY, generation=3, restarts=2, active_requests=4, waiting_requests=1),
    WorkerSnapshot("hermes", state=S.QUARANTINED),
]


def samples(text: bytes) -> Samples:
    """Every sample of an exposition, by name and labels; that it can be parsed is part of each test."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def of(text: bytes, name: str, **labels: str) -> float | None:
    return samples(text).get((name, tuple(sorted(labels.items()))))


def request(**fields: Any) -> RequestDone:
    values: dict[str, Any] = {
        "request_id": "r", "model": "phi", "endpoint": "/v1/completions", "status": 200, "duration_s": 1.5,
        "first_byte_s": 0.2, "generation": 1, "attempts": 1, "streamed": False,
    }  # fmt: skip
    return RequestDone(**(values | fields))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Sources(lambda: SNAPSHOTS, lambda: {"phi": 123_456}))


def test_what_a_worker_is_at_the_moment_of_the_scrape(metrics: Metrics) -> None:
    text = metrics.text()
    expected = {
        "llm_active_requests": 4, "llm_waiting_requests": 1, "llm_model_health": 1,
        "llm_worker_generation": 3, "llm_worker_restarts": 2, "llm_model_memory_usage_bytes": 123_456,
    }  # fmt: skip
    assert {name: of(text, name, model="phi") for name in expected} == expected
    assert of(text, "llm_model_health", model="hermes") == 0
    assert of(text, "llm_model_memory_usage_bytes", model="hermes") == 0
    states = {state: of(text, "llm_worker_state", model="hermes", state=state) for state in S}
    assert {state for state, value in states.items() if value} == {S.QUARANTINED}
    assert None not in states.values()


def test_requests_are_counted_and_timed(metrics: Metrics) -> None:
    for event in (
        request(),
        request(duration_s=0.3, status=200),
        request(status=499, first_byte_s=None),
        request(attempts=3, status=503),
        request(model="hermes", endpoint="/v1/chat/completions"),
        Notice(level="INFO", text="not a request"),
    ):
        metrics.consume(event)
    text = metrics.text()
    about = {"model": "phi", "endpoint": "/v1/completions"}
    assert of(text, "llm_requests_total", status="200", **about) == 2
    assert of(text, "llm_requests_total", status="499", **about) == 1
    assert of(text, "llm_request_duration_seconds_count", **about) == 4
    assert of(text, "llm_request_duration_seconds_sum", **about) == pytest.approx(1.5 * 3 + 0.3)
    assert of(text, "llm_request_duration_seconds_bucket", le="0.5", **about) == 1
    assert of(text, "llm_time_to_first_byte_seconds_count", **about) == 3, "one had none"
    assert of(text, "llm_request_replays_total", model="phi") == 2


def test_the_buckets_are_those_of_the_targets(metrics: Metrics) -> None:
    metrics.consume(request())
    buckets = {
        dict(labels)["le"]
        for name, labels in samples(metrics.text())
        if name == "llm_request_duration_seconds_bucket"
    }
    assert {float(bucket) for bucket in buckets} == {0.1, 0.5, 1, 2, 5, 10, 30, float("inf")}


def test_losses_are_counted_by_the_state_they_came_in(metrics: Metrics) -> None:
    for before, after in (
        (S.READY, S.FAILED),
        (S.READY, S.FAILED),
        (S.LOADING, S.FAILED),
        (S.READY, S.DRAINING),
    ):
        metrics.consume(Transition(model="phi", generation=1, before=before, after=after))
    text = metrics.text()
    assert of(text, "llm_worker_losses_total", model="phi", state="ready") == 2
    assert of(text, "llm_worker_losses_total", model="phi", state="loading") == 1
    assert of(text, "llm_worker_losses_total", model="phi", state="draining") is None


def test_a_models_port_shows_that_model_alone(metrics: Metrics) -> None:
    metrics.consume(request())
    metrics.consume(request(model="hermes"))
    shown = samples(metrics.text("phi"))
    assert {dict(labels)["model"] for _name, labels in shown} == {"phi"}
    everything = samples(metrics.text())
    assert {key: value for key, value in everything.items() if dict(key[1])["model"] == "phi"} == shown


def test_two_sets_of_series_do_not_mix() -> None:
    one, other = (Metrics(Sources(lambda: [], dict)) for _ in range(2))
    one.consume(request())
    assert (
        of(other.text(), "llm_requests_total", model="phi", endpoint="/v1/completions", status="200") is None
    )


ENGINE = b"""\
# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="%(name)s"} 2.0
# HELP vllm:generation_tokens_total Tokens.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="%(name)s"} 7.0
# HELP vllm:e2e_seconds Time.
# TYPE vllm:e2e_seconds histogram
vllm:e2e_seconds_bucket{le="1.0"} 1.0
vllm:e2e_seconds_bucket{le="+Inf"} 2.0
vllm:e2e_seconds_count 2.0
vllm:e2e_seconds_sum 3.5
# HELP python_info Python.
# TYPE python_info gauge
python_info{version="3.11"} 1.0
# HELP process_open_fds Descriptors.
# TYPE process_open_fds gauge
process_open_fds 12.0
"""


def engine(name: bytes) -> str:
    return (ENGINE % {b"name": name}).decode()


def test_engines_series_are_told_apart_and_otherwise_unchanged() -> None:
    text = label_engine_series({("phi", 3): engine(b"phi"), ("hermes", 1): engine(b"hermes")})
    found = samples(text)
    assert not [name for name, _ in found if name.startswith(("python_", "process_"))]
    common = {"engine": "0", "model_name": "phi", "model": "phi", "generation": "3"}
    assert of(text, "vllm:generation_tokens_total", **common) == 7
    assert of(text, "vllm:num_requests_running", **common) == 2
    assert of(text, "vllm:e2e_seconds_bucket", le="+Inf", model="hermes", generation="1") == 2
    assert of(text, "vllm:e2e_seconds_sum", model="hermes", generation="1") == 3.5
    assert len(found) == 2 * 6
    for kind in (b"# TYPE vllm:e2e_seconds histogram", b"# TYPE vllm:generation_tokens_total counter"):
        assert text.count(kind) == 1, "each family is declared once"
    assert b"# HELP vllm:e2e_seconds Time." in text


@pytest.mark.parametrize("garbage", ["vllm:tokens many\n", "{{{", 'a{b="c} 1\n'])
def test_an_engine_that_talks_nonsense_costs_its_own_series_alone(garbage: str) -> None:
    text = label_engine_series({("phi", 3): garbage, ("hermes", 1): engine(b"hermes")})
    assert len(samples(text)) == 6
    assert of(text, "vllm:e2e_seconds_count", model="hermes", generation="1") == 2


class Worker:
    """What is asked of a worker for a scrape."""

    def __init__(self, snapshot: WorkerSnapshot) -> None:
        self._snapshot = snapshot
        self.address: str | None = f"/sockets/{snapshot.model}" if snapshot.state is S.READY else None

    def snapshot(self) -> WorkerSnapshot:
        return self._snapshot


def scrape(answers: Mapping[str, Any], metrics: Metrics) -> Exposition:
    """Answers by address: bytes, an exception, or None for one that never comes."""

    async def ask(address: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        assert (method, path) == ("GET", "/metrics")
        answer = answers[address]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, tuple) else (200, answer)

    snapshots = [*SNAPSHOTS, WorkerSnapshot("openchat", state=S.READY, generation=1)]
    return Exposition(metrics, {seen.model: Worker(seen) for seen in snapshots}, ask)


async def test_a_models_scrape_is_its_own_series_and_its_engines_as_they_are(metrics: Metrics) -> None:
    text = await scrape({"/sockets/phi": engine(b"phi").encode()}, metrics).text("phi")
    assert of(text, "llm_model_health", model="phi") == 1
    assert text.endswith(engine(b"phi").encode()), "byte for byte"
    assert of(await scrape({}, metrics).text("hermes"), "llm_model_health", model="hermes") == 0


async def test_the_whole_scrape_has_every_engine_that_serves(metrics: Metrics) -> None:
    answers = {"/sockets/phi": engine(b"phi").encode(), "/sockets/openchat": engine(b"oc").encode()}
    text = await scrape(answers, metrics).text(None)
    assert of(text, "vllm:e2e_seconds_count", model="phi", generation="3") == 2
    assert of(text, "vllm:e2e_seconds_count", model="openchat", generation="1") == 2
    assert of(text, "llm_active_requests", model="phi") == 4


@pytest.mark.parametrize(
    "broken", [UpstreamLost("gone"), None, (500, b"oops"), b"\xff\xfe", b"vllm:tokens many\n"], ids=str
)
async def test_a_broken_engine_never_costs_the_scrape(
    metrics: Metrics, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "ENGINE_TIMEOUT_S", 0.05)
    answers = {"/sockets/phi": broken, "/sockets/openchat": engine(b"oc").encode()}
    text = await scrape(answers, metrics).text(None)
    assert of(text, "vllm:e2e_seconds_count", model="openchat", generation="1") == 2
    assert of(text, "llm_model_health", model="phi") == 1
    assert of(text, "vllm:e2e_seconds_count", model="phi", generation="3") is None
