"""The form of errors."""

from __future__ import annotations

import json

import pytest

from citadel_supervisor.errors import (
    BadRequest,
    BodyTooLarge,
    CitadelError,
    LaunchError,
    NotReady,
    UnknownModel,
    UpstreamLost,
    UpstreamRefused,
)
from citadel_supervisor.gateway.envelope import Failure, encode, error_event, failure_of

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


@pytest.mark.parametrize(
    ("error", "status", "openai", "code", "anthropic"),
    [
        (BadRequest("no"), 400, "invalid_request_error", "invalid_request", "invalid_request_error"),
        (UnknownModel("x", ["a"]), 404, "not_found_error", "model_not_found", "not_found_error"),
        (BodyTooLarge(5), 413, "invalid_request_error", "request_too_large", "request_too_large"),
        (NotReady("a", "loading", "", 2), 503, "service_unavailable", "model_not_ready", "overloaded_error"),
        (UpstreamLost("/run/secret.sock"), 502, "upstream_error", "engine_lost", "api_error"),
        (UpstreamRefused("/run/secret.sock"), 502, "upstream_error", "engine_lost", "api_error"),
        (LaunchError("pid 12"), 500, "internal_error", "internal_error", "api_error"),
    ],
)
def test_each_error_has_its_status_and_type(
    error: CitadelError, status: int, openai: str, code: str, anthropic: str
) -> None:
    failure = failure_of(error)
    assert failure.status == status
    data = json.loads(encode(failure, CHAT))
    assert set(data) == {"error"}
    assert set(data["error"]) == {"message", "type", "param", "code"}
    assert (data["error"]["type"], data["error"]["code"]) == (openai, code)
    other = json.loads(encode(failure, MESSAGES))
    assert other == {"type": "error", "error": {"type": anthropic, "message": data["error"]["message"]}}
    assert "secret" not in data["error"]["message"]
    assert "pid" not in data["error"]["message"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 413, 422, 429, 431, 500, 502, 503, 504])
def test_every_status_has_a_type_in_both_forms(status: int) -> None:
    failure = Failure(status, "x")
    assert json.loads(encode(failure, CHAT))["error"]["type"]
    assert json.loads(encode(failure, MESSAGES))["error"]["type"]


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.1, b"2"), (60.0, b"60")]
)
def test_retry_after_is_whole_seconds_and_at_least_one(seconds: float, header: bytes) -> None:
    assert failure_of(NotReady("a", "loading", "", seconds)).headers == [(b"retry-after", header)]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_an_event_is_one_event_whatever_the_message_holds(path: str) -> None:
    event = error_event(Failure(502, "two\n\nlines\r\nand data: [DONE]"), path)
    assert event.endswith(b"\n\n")
    assert event.count(b"\n\n") == 1
    assert b"\r" not in event
