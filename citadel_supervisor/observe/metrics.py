"""Prometheus series, made from event records and from snapshots at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from citadel_supervisor.events import Event, RequestDone, Transition
from citadel_supervisor.states import WorkerSnapshot, WorkerState

BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 30)


@dataclass(frozen=True, slots=True)
class Sources:
    """What a scrape reads, each called at that moment."""

    snapshots: Callable[[], Iterable[WorkerSnapshot]]
    memory: Callable[[], Mapping[str, int]]
    """Bytes by model."""


class Metrics:
    """Every series of the supervisor. Labels come from configuration and fixed lists, never from clients."""

    def __init__(self, sources: Sources) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llm_requests", "Requests answered, by HTTP status; 499: the client left first.",
            ["model", "endpoint", "status"], registry=self._registry,
        )  # fmt: skip
        self._duration = Histogram(
            "llm_request_duration_seconds", "From a request's arrival to the end of its answer.",
            ["model", "endpoint"], buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._first_byte = Histogram(
            "llm_time_to_first_byte_seconds", "From a request's arrival to the first byte of its answer.",
            ["model", "endpoint"], buckets=BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._replays = Counter(
            "llm_request_replays", "Requests given to a new generation after their engine died.",
            ["model"], registry=self._registry,
        )  # fmt: skip
        self._losses = Counter(
            "llm_worker_losses", "Generations lost unasked, by the state they were in.",
            ["model", "state"], registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Snapshots(sources))

    def consume(self, event: Event) -> None:
        """Count an event. Cheap; called for every request."""
        if isinstance(event, RequestDone):
            self._requests.labels(event.model, event.endpoint, str(event.status)).inc()
            self._duration.labels(event.model, event.endpoint).observe(event.duration_s)
            if event.first_byte_s is not None:
                self._first_byte.labels(event.model, event.endpoint).observe(event.first_byte_s)
            if event.attempts > 1:
                self._replays.labels(event.model).inc(event.attempts - 1)
        elif isinstance(event, Transition) and event.after is WorkerState.FAILED:
            self._losses.labels(event.model, str(event.before)).inc()

    def text(self, model: str | None = None) -> bytes:
        """The exposition of all series, or of one model's."""
        return generate_latest(_Chosen(self._registry, model))


class _Snapshots(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        memory = self._sources.memory()
        active = GaugeMetricFamily("llm_active_requests", "Requests in flight.", labels=["model"])
        waiting = GaugeMetricFamily(
            "llm_waiting_requests", "Requests waiting for a worker that is coming up.", labels=["model"]
        )
        health = GaugeMetricFamily(
            "llm_model_health", "1 when the model takes requests, else 0.", labels=["model"]
        )
        state = GaugeMetricFamily(
            "llm_worker_state", "1 for the state the worker is in.", labels=["model", "state"]
        )
        generation = GaugeMetricFamily(
            "llm_worker_generation", "Number of the present generation.", labels=["model"]
        )
        restarts = GaugeMetricFamily(
            "llm_worker_restarts",
            "Generations started after a loss, since the daemon began.",
            labels=["model"],
        )
        used = GaugeMetricFamily(
            "llm_model_memory_usage_bytes",
            "Proportional set size of the worker's processes.",
            labels=["model"],
        )
        for seen in self._sources.snapshots():
            active.add_metric([seen.model], seen.active_requests)
            waiting.add_metric([seen.model], seen.waiting_requests)
            health.add_metric([seen.model], float(seen.ready))
            for each in WorkerState:
                state.add_metric([seen.model, each], float(seen.state is each))
            generation.add_metric([seen.model], seen.generation)
            restarts.add_metric([seen.model], seen.restarts)
            used.add_metric([seen.model], memory.get(seen.model, 0))
        yield from (active, waiting, health, state, generation, restarts, used)


class _Chosen(Collector):
    """The registry's families, all of them or only their samples of one model."""

    def __init__(self, registry: CollectorRegistry, model: str | None) -> None:
        self._registry = registry
        self._model = model

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if self._model is None:
                yield family
                continue
            chosen = Metric(family.name, family.documentation, family.type, family.unit)
            chosen.samples = [
                sample for sample in family.samples if sample.labels.get("model") == self._model
            ]
            yield chosen


def label_engine_series(texts: Mapping[tuple[str, int], str]) -> bytes:
    """Several engines' expositions in one: each sample with its model's id and generation.

    `texts` is by (model, generation). Every engine calls itself `engine="0"`. One whose exposition cannot
    be read is left out. Takes milliseconds an engine: call it in a thread.
    """
    merged: dict[str, Metric] = {}
    for (model, generation), text in texts.items():
        try:
            families = list(text_string_to_metric_families(text))
        except (ValueError, IndexError):
            continue
        for family in families:
            if family.name.startswith(("python_", "process_")):
                continue
            target = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "model": model, "generation": str(generation)}
                target.samples.append(sample._replace(labels=labels))
    return generate_latest(_Merged(list(merged.values())))


class _Merged(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
