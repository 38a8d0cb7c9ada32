"""A bare HTTP client: sees every byte and every chunk as it arrives, and leaves when it is told to."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

from tests.fake_upstream import SECONDS


@dataclass
class Answer:
    """An answer; `body` is complete only if `whole`."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)
    whole: bool = False

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int, limit: int = 2**16) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit))

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def post(self, path: str, body: bytes = b"{}", headers: dict[str, str] | None = None) -> None:
        """Send a request."""
        lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def get(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: test"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n")

    async def head(self) -> Answer:
        """Wait for the head of an answer."""
        async with asyncio.timeout(SECONDS):
            lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for line in lines[1:-2]:
            name, _, value = line.partition(": ")
            assert name not in headers, f"{name} twice"
            headers[name] = value
        return Answer(int(lines[0].split(" ")[1]), headers)

    async def chunk(self) -> bytes:
        """The next chunk of a chunked answer; b"" at its proper end. Raises IncompleteReadError if cut."""
        async with asyncio.timeout(SECONDS):
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            data = await self._reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def answer(self, bodyless: bool = False) -> Answer:
        """A whole answer, or what there was of it before the connection was cut."""
        answer = await self.head()
        if bodyless:
            return answer
        try:
            if "content-length" in answer.headers:
                async with asyncio.timeout(SECONDS):
                    answer.body = await self._reader.readexactly(int(answer.headers["content-length"]))
            else:
                while chunk := await self.chunk():
                    answer.chunks.append(chunk)
                    answer.body += chunk
            answer.whole = True
        except asyncio.IncompleteReadError as error:
            answer.body += error.partial if "content-length" in answer.headers else b""
        return answer

    async def closed(self) -> bytes:
        """Wait until the server has closed the connection; what came before that."""
        async with asyncio.timeout(SECONDS):
            return await self._reader.read()

    async def leave(self, reset: bool = False) -> None:
        """Close the connection, with a reset if told so."""
        if reset:
            sock: socket.socket = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass
