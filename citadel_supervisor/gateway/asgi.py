"""What the gateway's handlers share of ASGI: the client's connection, the body, and short answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from starlette.types import Receive, Scope, Send

from citadel_supervisor.errors import BodyTooLarge, ClientGone

Header = tuple[bytes, bytes]

LONGEST_REQUEST_ID = 128
JSON = b"application/json"


class Client(Protocol):
    """The connection of the client whose request is being answered, beyond what ASGI offers."""

    @property
    def left(self) -> bool:
        """Whether the client is gone."""
        ...

    @property
    def answered(self) -> bool:
        """Whether the head of an answer has been sent."""
        ...

    def watch(self, on_leave: Callable[[], object] | None) -> None:
        """Call `on_leave` once if the client leaves before this request is answered; None ends that.

        To be called when the request's body has been read: reading goes on so that leaving is noticed.
        """
        ...

    def cut(self) -> None:
        """End the answer visibly unfinished: what was sent is flushed, then the connection is closed."""
        ...


def client_of(scope: Scope) -> Client:
    """The client of the request in `scope`, which `gateway.server` puts there."""
    return cast(Client, scope["state"]["client"])


def request_id_of(scope: Scope) -> bytes:
    """The request's id: the client's own x-request-id if it is short printable ASCII, else a new one."""
    state = scope["state"]
    known: bytes | None = state.get("request_id")
    if known is None:
        known = state["request_id"] = _sent_id(scope["headers"]) or _new_id()
    return known


def _sent_id(headers: Sequence[Header]) -> bytes | None:
    for name, value in headers:
        if name == b"x-request-id":
            fine = (
                len(value) <= LONGEST_REQUEST_ID and value.isascii() and value.decode("ascii").isprintable()
            )
            return value if fine else None
    return None


def _new_id() -> bytes:
    """A random (version 4) UUID in hexadecimal; a quarter of the time that uuid.uuid4() takes."""
    random = bytearray(os.urandom(16))
    random[6] = random[6] & 0x0F | 0x40
    random[8] = random[8] & 0x3F | 0x80
    return random.hex().encode()


async def read_body(headers: Sequence[Header], receive: Receive, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises BodyTooLarge as soon as that is known, and ClientGone."""
    for name, value in headers:
        if name == b"content-length" and int(value) > limit:
            raise BodyTooLarge(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while it sent its request")
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLarge(limit)
        more = message.get("more_body", False)
        if not more and not parts:
            return part
        parts.append(part)
        if not more:
            return b"".join(parts)


async def respond(
    send: Send, status: int, body: bytes, content_type: bytes = JSON, headers: Sequence[Header] = ()
) -> None:
    """Send a whole answer."""
    own = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body, "more_body": False})
