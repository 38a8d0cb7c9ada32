"""Errors in the form each interface promises: OpenAI's, and Anthropic's on /v1/messages.

A `Failure` is what went wrong, in words that are safe to show; the functions below give it its form as
an answer or as an event in a stream that has begun.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from loguru import logger
from starlette.types import ASGIApp, Receive, Scope, Send

from citadel_supervisor.errors import (
    BadRequest,
    BodyTooLarge,
    CitadelError,
    NotReady,
    UnknownModel,
    UpstreamError,
)
from citadel_supervisor.gateway.asgi import Header, client_of, request_id_of, respond

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "unprocessable_entity_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "internal_error",
    502: "upstream_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {
    **dict.fromkeys((400, 405, 422, 431), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """One error, before it has a form. `retry_after_s` becomes Retry-After, rounded up, at least 1."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    close: bool = False
    """End the client's connection with the answer."""

    @property
    def headers(self) -> list[Header]:
        """The headers that belong to it."""
        headers = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
        if self.close:
            headers.append((b"connection", b"close"))
        return headers


def failure_of(error: CitadelError) -> Failure:
    """The failure that a client is shown for `error`; an error that is none of the client's is a 500."""
    text = str(error)
    match error:
        case BadRequest(param=param):
            return Failure(400, text, "invalid_request", param)
        case UnknownModel():
            return Failure(404, text, "model_not_found", "model")
        case BodyTooLarge():
            return Failure(413, text, "request_too_large", close=True)
        case NotReady(retry_after_s=retry_after_s):
            return Failure(503, text, "model_not_ready", retry_after_s=retry_after_s)
        case UpstreamError():
            # What it was exactly (a path, a process) is the operator's to know, and in the log.
            return Failure(502, "the model's engine was lost while it worked on the request", "engine_lost")
    return INTERNAL


INTERNAL = Failure(
    500, "an internal error; the log has the details under this request's id", "internal_error"
)


def encode(failure: Failure, path: str) -> bytes:
    """The body of an answer, in the form that the endpoint at `path` promises."""
    return msgspec.json.encode(_anthropic(failure) if path == MESSAGES else _openai(failure))


def error_event(failure: Failure, path: str, sequence: int = 0) -> bytes:
    """A server-sent event that ends a stream which has begun. `sequence` is for /v1/responses alone."""
    if path == MESSAGES:
        return b"event: error\ndata: " + msgspec.json.encode(_anthropic(failure)) + b"\n\n"
    if path == RESPONSES:
        data = {
            "type": "error",
            "code": failure.code,
            "message": failure.message,
            "param": failure.param,
            "sequence_number": sequence,
        }
        return b"event: error\ndata: " + msgspec.json.encode(data) + b"\n\n"
    return b"data: " + msgspec.json.encode(_openai(failure)) + b"\n\n"


async def refuse(send: Send, failure: Failure, path: str, headers: Sequence[Header] = ()) -> None:
    """Answer with `failure`; nothing may have been sent."""
    await respond(send, failure.status, encode(failure, path), headers=[*failure.headers, *headers])


class Guard:
    """An ASGI wrapper: what goes wrong by a bug inside becomes a 500, is logged once, and no more."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Never raises but for cancellation."""
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            request_id = request_id_of(scope)
            path = scope["path"]
            logger.bind(request_id=request_id.decode()).opt(exception=error).error(
                "a request failed by a bug"
            )
            client = client_of(scope)
            if client.answered:
                client.cut()
            else:
                await refuse(send, INTERNAL, path, [(b"x-request-id", request_id)])


def _openai(failure: Failure) -> dict[str, object]:
    return {
        "error": {
            "message": failure.message,
            "type": _TYPES.get(failure.status, "internal_error"),
            "param": failure.param,
            "code": failure.code,
        }
    }


def _anthropic(failure: Failure) -> dict[str, object]:
    kind = _ANTHROPIC_TYPES.get(failure.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}}
