"""What each port answers: the allow-list, the gateway's own endpoints, and what is passed on.

One ASGI app serves every data port and tells them apart by the port number that the client's connection
came in on. A path is matched byte for byte as it was sent, so that no spelling of another path gets
through; the path that an engine sees is the gateway's own constant.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from citadel_supervisor.config import Settings
from citadel_supervisor.errors import ClientGone, RequestError, UnknownModel
from citadel_supervisor.events import RequestDone
from citadel_supervisor.gateway.asgi import Header, client_of, read_body, request_id_of, respond
from citadel_supervisor.gateway.backend import Backend
from citadel_supervisor.gateway.envelope import Failure, Guard, failure_of, refuse
from citadel_supervisor.gateway.relay import CLIENT_LEFT, Relay, Request
from citadel_supervisor.gateway.reports import Reports
from citadel_supervisor.gateway.router import Catalog, Chosen, ModelName
from citadel_supervisor.gateway.sockets import BoundPorts, port_number
from citadel_supervisor.gateway.upstream import UpstreamPool

RELAYED = frozenset(
    {
        b"/v1/chat/completions", b"/v1/completions", b"/v1/embeddings", b"/v1/responses", b"/v1/messages",
        b"/tokenize", b"/detokenize",
    }
)  # fmt: skip
HEALTH, METRICS, MODELS = b"/health", b"/metrics", b"/v1/models"
ONE_MODEL = MODELS + b"/"
METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
"""prometheus-client's plain text exposition, which is what an engine's own metrics are in too."""
LONGEST_SHOWN = 100

DRAINING = Failure(503, "the gateway is shutting down", "draining", retry_after_s=5, close=True)

Metrics = Callable[[str | None], Awaitable[bytes]]
"""`metrics(model)`: the exposition of one model, or of everything for None."""
Publish = Callable[[RequestDone], None]


@dataclass(frozen=True, slots=True)
class Site:
    """What one port is for."""

    model: str | None = None
    """The model whose own port it is; None: the whole."""
    paths: frozenset[bytes] = frozenset()
    """The gateway's own endpoints on it."""
    relays: bool = False
    """Whether requests and the list of models are served on it."""

    def method(self, path: bytes) -> str | None:
        """The one method that `path` takes here; None if there is no such path."""
        if self.relays:
            if path in RELAYED:
                return "POST"
            if path == MODELS or (path.startswith(ONE_MODEL) and path != ONE_MODEL):
                return "GET"
        return "GET" if path in self.paths else None


NOWHERE = Site()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that follows from one configuration; replaced whole on reload."""

    sites: dict[int, Site]
    catalog: Catalog
    relay: Relay
    reports: Reports
    max_body: int


class Gateway:
    """The ASGI app of all data ports. Made by `build_apps`."""

    def __init__(self, pool: UpstreamPool, metrics: Metrics, publish: Publish) -> None:
        self.active = 0
        """Requests being relayed, from the arrival of their head to the end of their answer."""
        self.draining = False
        self._pool = pool
        self._metrics = metrics
        self._publish = publish
        self._model_name = ModelName()
        self._idle: asyncio.Future[None] | None = None
        self._created = int(time.time())
        self._plan: _Plan | None = None

    def configure(self, settings: Settings, ports: BoundPorts, backends: Mapping[str, Backend]) -> None:
        """Serve by `settings` from the next request on; those in flight finish by the old ones."""
        whole = frozenset({HEALTH, METRICS})
        sites = {port_number(sock): Site(model, whole, relays=True) for model, sock in ports.models.items()}
        sites[port_number(ports.router)] = Site(None, whole, relays=True)
        sites[port_number(ports.metrics)] = Site(None, frozenset({METRICS}))
        sites[port_number(ports.health)] = Site(None, frozenset({HEALTH}))
        catalog = Catalog(settings, backends)
        self._plan = _Plan(
            sites,
            catalog,
            Relay(self._pool, settings.gateway),
            Reports(settings, catalog, self._created),
            settings.gateway.max_body,
        )

    def begin_drain(self) -> None:
        """From now on no request is taken; those in flight go on."""
        self.draining = True

    async def drained(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds until no request is in flight; False if some still are."""
        if self.active:
            if self._idle is None or self._idle.done():
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle], timeout=timeout_s)
        return not self.active

    def forget(self, address: str) -> None:
        """Close the idle connections to an engine that is gone."""
        self._pool.forget(address)

    def close(self) -> None:
        """Close the idle connections to all engines."""
        self._pool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plan = self._plan
        assert plan is not None
        site = plan.sites.get(scope["server"][1], NOWHERE)
        path: bytes = scope["raw_path"]
        allowed = site.method(path)
        shown = scope["path"][:LONGEST_SHOWN]
        if allowed is None:
            await _refuse(scope, send, Failure(404, f"there is nothing at {shown} on this port", "not_found"))
        elif scope["method"] != allowed:
            wrong = Failure(405, f"{shown} takes {allowed} only", "method_not_allowed")
            await _refuse(scope, send, wrong, (b"allow", allowed.encode()))
        elif allowed == "POST":
            await self._relayed(plan, site, scope, receive, send)
        else:
            await self._own(plan, site, path, scope, send)

    async def _relayed(self, plan: _Plan, site: Site, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(
            request_id=request_id_of(scope),
            endpoint=scope["path"],
            query=scope["query_string"],
            headers=scope["headers"],
            client=client_of(scope),
            arrived=time.perf_counter(),
            model=site.model or "",
        )
        self.active += 1
        try:
            failure = await self._served(plan, site, request, receive, send)
            if failure is not None:
                request.status = failure.status
                await _refuse(scope, send, failure)
        except Exception:
            request.status = 500
            raise
        finally:
            self.active -= 1
            if not self.active and self._idle is not None and not self._idle.done():
                self._idle.set_result(None)
            self._publish(request.done())

    async def _served(
        self, plan: _Plan, site: Site, request: Request, receive: Receive, send: Send
    ) -> Failure | None:
        """Relay the request, or say why not before anything was sent."""
        if self.draining:
            return DRAINING
        try:
            request.body = await read_body(request.headers, receive, plan.max_body)
            chosen = self._choose(plan, site, request.body)
        except ClientGone:
            request.status = CLIENT_LEFT
        except (RequestError, UnknownModel) as error:
            return failure_of(error)
        else:
            await plan.relay.serve(request, chosen, send)
        return None

    def _choose(self, plan: _Plan, site: Site, body: bytes) -> Chosen:
        """The model that answers. On a model's own port the body is the engine's to judge."""
        if site.model is not None:
            return plan.catalog.named(site.model)
        return plan.catalog.resolve(self._model_name.read(body))

    async def _own(self, plan: _Plan, site: Site, path: bytes, scope: Scope, send: Send) -> None:
        """Answer one of the gateway's own endpoints."""
        ids = [(b"x-request-id", request_id_of(scope))]
        if path == METRICS:
            await respond(send, 200, await self._metrics(site.model), METRICS_TYPE, ids)
        elif path == HEALTH:
            report = plan.reports.health(site.model, self.draining)
            await _report(send, report.status, report.body, [*report.headers, *ids])
        elif path == MODELS:
            await _report(send, 200, plan.reports.models(site.model), ids)
        else:
            try:
                card = plan.reports.model(scope["path"].removeprefix(ONE_MODEL.decode()), site.model)
            except UnknownModel as error:
                await _refuse(scope, send, failure_of(error))
            else:
                await _report(send, 200, card, ids)


def build_apps(
    settings: Settings,
    ports: BoundPorts,
    backends: Mapping[str, Backend],
    metrics: Metrics,
    publish: Publish,
) -> tuple[Gateway, Guard]:
    """The gateway, and the app to serve on all `ports`."""
    gateway = Gateway(UpstreamPool(), metrics, publish)
    gateway.configure(settings, ports, backends)
    return gateway, Guard(gateway)


async def _report(send: Send, status: int, data: object, headers: list[Header]) -> None:
    await respond(send, status, msgspec.json.encode(data), headers=headers)


async def _refuse(scope: Scope, send: Send, failure: Failure, *headers: Header) -> None:
    await refuse(send, failure, scope["path"], [(b"x-request-id", request_id_of(scope)), *headers])
