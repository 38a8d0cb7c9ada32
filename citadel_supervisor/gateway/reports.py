"""What the gateway itself says of the models: their cards, and their health."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import UnknownModel
from citadel_supervisor.gateway.asgi import Header
from citadel_supervisor.gateway.router import AUTO, Catalog
from citadel_supervisor.states import COMING_UP, WorkerSnapshot, WorkerState

Json = Mapping[str, object]


class Health(NamedTuple):
    """An answer of /health."""

    status: int
    body: Json
    headers: list[Header]


class Reports:
    """Reports on the models of one configuration. `created` is seconds since the epoch."""

    def __init__(self, settings: Settings, catalog: Catalog, created: int) -> None:
        self._settings = settings
        self._catalog = catalog
        self._created = created

    def models(self, only: str | None) -> Json:
        """The answer of /v1/models; `only` is the model whose own port was asked."""
        names = [only] if only is not None else list(self._settings.models)
        return {"object": "list", "data": [self._card(name) for name in names]}

    def model(self, name: str, only: str | None) -> Json:
        """The answer of /v1/models/NAME, by id, alias or "auto". Raises UnknownModel."""
        if only is None:
            return self._card(self._catalog.resolve(name).model)
        if name != AUTO and self._catalog.named(name).model != only:
            raise UnknownModel(name, [only])
        return self._card(only)

    def health(self, only: str | None, draining: bool) -> Health:
        """The answer of /health: 200 where requests are answered now, else 503 with Retry-After."""
        if draining:
            return Health(503, {"status": "draining"}, [(b"retry-after", b"5")])
        if only is not None:
            return _health_of_one(self._snapshot(only))
        seen = {name: self._snapshot(name) for name in self._settings.models}
        models = {name: _described(snapshot) for name, snapshot in seen.items()}
        if any(snapshot.ready for snapshot in seen.values()):
            return Health(200, {"status": "ready", "models": models}, [])
        wait_s = min(_retry_after_s(snapshot) for snapshot in seen.values())
        return Health(503, {"status": "unavailable", "models": models}, [_retry_after(wait_s)])

    def _snapshot(self, model: str) -> WorkerSnapshot:
        return self._catalog.named(model).backend.snapshot()

    def _card(self, model: str) -> Json:
        section = self._settings.models[model]
        return {
            "id": model,
            "object": "model",
            "created": self._created,
            "owned_by": "citadel",
            "root": str(section.checkpoint_path),
            "parent": None,
            "max_model_len": section.max_model_len,
            "state": self._snapshot(model).state,
        }


def _health_of_one(seen: WorkerSnapshot) -> Health:
    body = {"status": seen.state, "model": seen.model, **_described(seen)}
    if seen.ready:
        return Health(200, body, [])
    return Health(503, body, [_retry_after(_retry_after_s(seen))])


def _described(seen: WorkerSnapshot) -> Json:
    return {
        "state": seen.state,
        "reason": seen.reason,
        "progress": seen.progress.text(),
        "generation": seen.generation,
        "since": seen.since,
    }


def _retry_after_s(seen: WorkerSnapshot) -> int:
    """A guess at when asking again may be of use, in seconds."""
    if seen.state in COMING_UP:
        return 2
    return 5 if seen.state in (WorkerState.DRAINING, WorkerState.STOPPING) else 30


def _retry_after(seconds: int) -> Header:
    return (b"retry-after", b"%d" % seconds)
